"""Processes that are killed, and disks that fill up, at any moment: nothing saved is lost, and resumes are exact.

`make soak` does the same for longer.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


def kill_runs(work: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """What tests/kill_runs.py found; it fails if anything differs by a bit."""
    command = [sys.executable, str(TESTS / "kill_runs.py"), "--work", str(work), *arguments]
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | own | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_runs_killed_at_random(tmp_path: Path) -> None:
    found = kill_runs(tmp_path / "work", "--kills", "50")
    assert found["kills"] == 50
    assert found["kills while a checkpoint was being written"] >= 5
    assert found["checkpoints compared bit for bit"] >= 50
    assert found["runs resumed to their end, bit for bit"] >= 3
    assert found["checkpoints lost"] == found["bytes lost"] == 0


def test_killed_and_disk_full_at_every_operation(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("stands between the process and its C library, for which it needs Linux and a C compiler")
    library = tmp_path / "faulty_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, TESTS / "faulty_disk.c", "-ldl"], check=True)
    found = kill_runs(tmp_path / "work", "--faults", "halfway", "full", LD_PRELOAD=str(library))
    assert found["faults"]["halfway"] == found["faults"]["full"] >= 50  # writes, fsyncs, renames of one checkpoint
    assert found["resumed after a fault to the end, bit for bit"] >= 2
