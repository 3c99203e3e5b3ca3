"""The learning rate of each method in `rankwise demo`: held-out loss over a grid of rates and seeds.

    python benchmarks/demo_learning_rates.py [--seeds 0 1] [--threads 1]

Runs that are in the result file already are kept, so the grid can be stopped, resumed and widened.
"""

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import trl.trainer.utils
from rich.console import Console

from rankwise.train import demo
from rankwise.train.run import run

RESULTS = Path(__file__).parent / "results" / "demo_learning_rates.json"
GRID = {"LoRA": [1e-3, 2e-3, 4e-3], "LoRA-GA": [3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4, 5e-4]}


def held_out_loss(method: str, learning_rate: float, seed: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        recipe = demo.recipe(
            method, Path(directory), learning_rate=learning_rate, seed=seed, eval_steps=10**6, save_steps=10**6
        )
        console = Console(quiet=True)
        prepared = run.prepare(run.load(recipe, console), console)
        prepared.trainer.args.eval_on_start = False
        prepared.trainer.train()
        return prepared.trainer.evaluate()["eval_loss"]


def best(runs: list[dict[str, object]]) -> dict[str, float]:
    """Method → the rate with the lowest mean held-out loss, among rates that all seeds ran."""
    found = {}
    for method in GRID:
        seeds = {r["seed"] for r in runs if r["method"] == method}
        losses: dict[float, list[float]] = {}
        for r in runs:
            if r["method"] == method:
                losses.setdefault(r["learning_rate"], []).append(r["held_out_loss"])
        means = {rate: sum(values) / len(values) for rate, values in losses.items() if len(values) == len(seeds)}
        if means:
            found[method] = min(means, key=means.get)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=list(GRID))
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # TRL scores only the trained tokens on a GPU, but every token on a CPU: the same loss, a quarter slower.
    trl.trainer.utils._use_triton = lambda device: True
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    runs = results["runs"]
    done = {(r["method"], r["learning_rate"], r["seed"]) for r in runs}
    for seed in options.seeds:
        for method in options.methods:
            for rate in options.rates or GRID[method]:
                if (method, rate, seed) in done:
                    continue
                loss = held_out_loss(method, rate, seed)
                print(f"{method:8} {rate:g} seed {seed}: {loss:.4f}", flush=True)
                runs.append({"method": method, "learning_rate": rate, "seed": seed, "held_out_loss": loss})
                results |= {
                    "what": "held-out loss after the demo's steps, by method, learning rate and seed",
                    "best": best(runs),
                    "versions": {name: version(name) for name in ("rankwise", "torch", "transformers", "trl")},
                    "machine": f"{platform.machine()}, {options.threads} thread(s)",
                }
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
