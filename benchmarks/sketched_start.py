"""Held-out loss after training from a sketched LoRA-GA start, beside the exact one, over seeds.

python benchmarks/sketched_start.py [--seeds 0 1 2] [--steps 30] [--threads 2]
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine, write
from rich.console import Console

from rankwise.train import demo
from rankwise.train.run import run


def held_out_loss(method: str, seed: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        recipe = demo.recipe(
            "LoRA-GA",
            Path(directory),
            init_method=method,
            seed=seed,
            max_steps=steps,
            eval_steps=10**6,
            save_steps=10**6,
        )
        console = Console(quiet=True)
        prepared = run.prepare(run.load(recipe, console), console)
        prepared.trainer.args.eval_on_start = False
        prepared.trainer.train()
        return float(prepared.trainer.evaluate()["eval_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    losses: dict[str, list[float]] = {"exact": [], "sketch": []}
    for seed in options.seeds:
        for method, found in losses.items():
            found.append(held_out_loss(method, seed, options.steps))
            print(method, seed, found[-1], flush=True)
    gaps = [s - e for s, e in zip(losses["sketch"], losses["exact"], strict=True)]
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "steps": options.steps, "seeds": options.seeds}
    result["held-out loss"] = losses
    result["sketch - exact"] = {"mean": statistics.fmean(gaps), "largest": max(gaps, key=abs)}
    result["standard deviation over seeds"] = {name: statistics.stdev(found) for name, found in losses.items()}
    write("sketched_start", result)


if __name__ == "__main__":
    main()
