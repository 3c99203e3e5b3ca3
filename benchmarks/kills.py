"""Kills training runs and saves at random, and at every operation on the disk; what was lost: results/kills.json.

    python benchmarks/kills.py --kills 500

The same as tests/end_to_end/test_kills.py and test_resaves.py, for longer (`make soak`). A resumed run that differs by
a bit ends it, as does an adapter that is a mixture of two.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import machine, write

TESTS = Path(__file__).parents[1] / "tests"


def program(name: str, work: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, str(TESTS / name), "--work", str(work), *arguments]
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | own | environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as each run has
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "faulty_disk.so"
        compiler = shutil.which("cc") or "gcc"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, TESTS / "faulty_disk.c", "-ldl"], check=True)
        work, often = Path(folder), ("--kills", str(options.kills), "--seed", str(options.seed))
        content = {
            "at random": program("kill_runs.py", work / "kills", *often),
            "at every operation on the disk while a checkpoint is saved": program(
                "kill_runs.py", work / "faults", "--faults", "before", "halfway", "full", LD_PRELOAD=str(library)
            ),
            "adapters saved over each other": program("resaves.py", work / "saves", *often),
        }
    facts = machine()
    facts["versions"] |= {name: version(name) for name in ("accelerate", "trl", "safetensors")}
    write("kills", content | {"machine": facts})


if __name__ == "__main__":
    main()
