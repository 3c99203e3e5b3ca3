"""N arms in one run against N separate runs, on SmolLM2-135M: losses, time, peak memory.

    python benchmarks/sweep.py                      # results/sweep.json
    python benchmarks/sweep.py --steps 20 --rows 8

Each contender is a process of its own with one thread: the separate runs, one after the other, and a sweep for each N.
The time is the processor's, from loading the model to the last step, so that other work on the machine does not count;
imports and the files at a run's end, which both make alike, are left out. Peak memory is the process's largest resident
set, for the separate runs after the first of them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import MODEL, machine, write

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 16": {"rank": 16},
    "seed 1": {"seed": 1},
    "slow": {"learning_rate": 1e-4},
    "spectral": {"optimizer": "spectral"},
    "lora-plus": {"optimizer": "lora-plus", "learning_rate": 5e-4},
    "rslora": {"scaling": "rslora", "rank": 4},
    "decay": {"weight_decay": 0.1, "lr_scheduler_type": "cosine"},
}
COUNTS = (1, 4, 8)


def _recipe(directory: str, steps: int, batch: int, length: int) -> Any:
    from rankwise.train import recipe as recipes

    return recipes.parse(
        {
            "model": MODEL, "dtype": "float32", "data": "kjv", "max_train_samples": 64, "max_eval_samples": 4,
            "max_length": length, "rank": 8, "learning_rate": 1e-3, "per_device_train_batch_size": batch,
            "max_steps": steps, "eval_steps": steps, "save_steps": 10_000, "logging_steps": 1, "output_dir": directory,
        }
    )  # fmt: skip


def _contend(count: int, alone: bool, rows: int | None, steps: int, batch: int, length: int) -> dict[str, Any]:
    """Train the first arms, together or each alone; what came of it as plain data."""
    from rich.console import Console

    from rankwise.sweep.arms import arms_of
    from rankwise.sweep.pruning import none
    from rankwise.sweep.training import Training
    from rankwise.train.data.dataset import load_data
    from rankwise.train.run import run

    torch.set_num_threads(1)
    losses: dict[str, list[float]] = {}
    silent = Console(quiet=True)

    def recorded(prepared: Any, *_: Any) -> None:
        history = prepared.trainer.state.log_history
        losses[Path(prepared.recipe.output_dir).name] = [row["loss"] for row in history if "loss" in row]

    run._written = recorded  # the files at the end
    seconds, peak = [], 0
    with tempfile.TemporaryDirectory() as directory:
        recipe = _recipe(directory, steps, batch, length)
        arms = arms_of(recipe, dict(list(ARMS.items())[:count]), "benchmark")
        data = load_data(recipe)
        began = time.process_time()
        if alone:
            for arm in arms:
                loaded = run.load(arm.recipe, silent)
                run.execute(run.start(run.check_resuming(loaded, silent, data=data), silent), silent)
                seconds.append(time.process_time() - began)
                peak, began = peak or _peak(), time.process_time()
        else:
            Training(run.load(recipe, silent), arms, data, silent).train(none, rows)
            seconds, peak = [time.process_time() - began], _peak()
    return {"seconds": seconds, "peak": peak, "losses": losses}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Every contender in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="rows of an arm's batch")
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--rows", type=int, default=4, help="rows of a forward")
    parser.add_argument("--contender", help="internal: one of them, as JSON")
    args = parser.parse_args()
    setting = {"steps": args.steps, "batch": args.batch, "length": args.length}
    if args.contender:
        print(json.dumps(_contend(**json.loads(args.contender), **setting)))
        return

    def contend(**contender: Any) -> Any:
        flags = [f"--{name}={value}" for name, value in setting.items()]
        command = [sys.executable, __file__, f"--contender={json.dumps(contender)}", *flags]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    alone = contend(count=max(COUNTS), alone=True, rows=None)
    content: dict[str, Any] = {
        "machine": machine(),
        "arms": ARMS,
        **setting,
        "rows": args.rows,
        "alone": alone,
        "sweeps": {},
    }
    for count in COUNTS:
        sweep = contend(count=count, alone=False, rows=args.rows)
        difference = max(
            abs(loss - other)
            for arm, losses in sweep["losses"].items()
            for loss, other in zip(losses, alone["losses"][arm], strict=True)
        )
        content["sweeps"][count] = {
            "largest difference of a loss": difference,
            "time over the sum of separate runs": round(sweep["seconds"][0] / sum(alone["seconds"][:count]), 3),
            "peak memory over one run's": round(sweep["peak"] / alone["peak"], 3),
            **sweep,
        }
        write("sweep", content)


if __name__ == "__main__":
    main()
