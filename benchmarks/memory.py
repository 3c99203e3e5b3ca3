"""What `rankwise plan --memory` says against what runs of two steps held at most, each in a process of its own.

python benchmarks/memory.py
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from common import machine, write

SETTINGS = (
    {"per_device_train_batch_size": 1, "max_length": 128},
    {"per_device_train_batch_size": 4, "max_length": 128},
    {"per_device_train_batch_size": 4, "max_length": 256, "rank": 64},
    {"per_device_train_batch_size": 2, "max_length": 512, "gradient_checkpointing": True},
    {"per_device_train_batch_size": 4, "max_length": 128, "init": "pissa"},
)
RUN = """
import json, sys
from pathlib import Path
from rich.console import Console
from rankwise.train import recipe as recipes
from rankwise.train.run import run
from rankwise.train.run.memory import plan_memory
from rankwise.train.trainer.run_log import LOG, peak_memory
recipe = recipes.parse(json.loads(sys.argv[1]))
floor = peak_memory()
run.train(recipe, Console(quiet=True))
rows = [json.loads(line) for line in (Path(recipe.output_dir) / LOG).read_text().splitlines()]
peak = max(row["peak_memory_gib"] for row in rows if "loss" in row)
print(json.dumps({"process": floor, "measured": round(peak * 2**30), "planned": vars(plan_memory(recipe))}))
"""


def main() -> None:
    rows = []
    with TemporaryDirectory() as scratch:
        data = Path(scratch) / "long.jsonl"
        text = "In the beginning God created the heaven and the earth. " * 100
        data.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(8)))
        for number, changes in enumerate(SETTINGS):
            recipe = {"model": "smollm2-135m", "data": str(data), "max_steps": 2, "logging_steps": 1}
            recipe |= {"output_dir": f"{scratch}/run-{number}", **changes}
            done = subprocess.run([sys.executable, "-c", RUN, json.dumps(recipe)], stdout=subprocess.PIPE, check=True)
            row = {**changes, **json.loads(done.stdout.splitlines()[-1])}
            planned = row["planned"]
            total = row["process"] + sum(planned[part] for part in ("base", "adapter", "optimizer"))
            total += max(planned["step"], planned["evaluation"])
            rows.append({**row, "ratio": total / row["measured"]})
            print(rows[-1], flush=True)
    write("memory", {"machine": machine(), "runs": rows})


if __name__ == "__main__":
    main()
