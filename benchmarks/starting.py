"""What a command takes from Enter to its end: seconds on the clock and of computing, and whether it imports torch.

python benchmarks/starting.py [--repeats 5]

The clock's figures want an idle machine; the computing's also bear a busy one, best with OMP_NUM_THREADS=1, as threads
that wait for each other count as computing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import MODEL, machine, write

# At most, on one idle core, in seconds; of `train`, what is not its steps.
GOALS = {"--help": 0.7, "--version": 0.7, "methods": 0.7, "inspect": 0.7, "recipe error": 0.7}
GOALS |= {"plan": 5, "check": 20, "train": 20, "generate": 10, "analyze": 14}
RECIPE = {
    "model": MODEL, "data": "kjv", "max_train_samples": 64, "max_eval_samples": 8, "max_length": 128, "max_steps": 3,
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
}  # fmt: skip
COMMANDS = {
    "--help": ["--help"],
    "--version": ["--version"],
    "methods": ["methods"],
    "inspect": ["inspect", "run/adapter"],
    "recipe error": ["plan", "recipe.yaml", "--init", "lora-gu"],
    "plan": ["plan", "recipe.yaml"],
    "check": ["check", "recipe.yaml"],
    "train": ["train", "recipe.yaml", "--output-dir", "run"],
    "generate": ["generate", "run/adapter", "--prompt", "In the beginning", "--max-new-tokens", "64"],
    "analyze": ["analyze", "run/adapter"],
}
IMPORTS = """
import sys
from rankwise.cli import app
try:
    app(sys.argv[1:])
except SystemExit:
    pass
print("torch" in sys.modules)
"""


def timed(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    began, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-m", "rankwise", *arguments], cwd=folder, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, os.times()
    assert done.returncode in (0, 2), done.stderr
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def imports_torch(arguments: list[str], folder: Path) -> bool:
    """Whether torch is there when a command has ended."""
    done = subprocess.run([sys.executable, "-c", IMPORTS, *arguments], cwd=folder, capture_output=True, text=True)
    return done.stdout.split()[-1] == "True"


def step_seconds(folder: Path) -> float:
    """Of the last training run: its loop without its evaluations."""
    (rows,) = json.loads((folder / "run" / "report.json").read_text())["runs"].values()
    loop = next(row["train_runtime"] for row in rows if "train_runtime" in row)
    return float(loop - sum(row.get("eval_runtime", 0) for row in rows))


def measured(name: str, folder: Path, repeats: int) -> dict[str, object]:
    """Minimum and median of a command's runs."""
    walls, cpus, beside_steps = [], [], []
    for _ in range(repeats):
        wall, cpu = timed(COMMANDS[name], folder)
        walls.append(wall)
        cpus.append(cpu)
        if name == "train":
            beside_steps.append(wall - step_seconds(folder))
    seconds = {"wall": walls, "cpu": cpus} | ({"wall without steps": beside_steps} if beside_steps else {})
    row: dict[str, object] = {
        kind: {"min": round(min(values), 2), "median": round(statistics.median(values), 2)}
        for kind, values in seconds.items()
    }
    row |= {"goal": GOALS[name], "imports torch": imports_torch(COMMANDS[name], folder)}
    print(f"{name:14}", row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "recipe.yaml").write_text("".join(f"{name}: {value}\n" for name, value in RECIPE.items()))
        timed(COMMANDS["train"], folder)  # makes what the others read, and the model's cached copy
        rows = {name: measured(name, folder, repeats) for name in COMMANDS}
    load = [round(minutes, 1) for minutes in os.getloadavg()]
    write("starting", {"machine": machine(), "load average at the end": load, "repeats": repeats, "seconds": rows})


if __name__ == "__main__":
    main()
