"""A brief run of the coverage-guided fuzzer of the checkpoint reader; `make fuzz` is the long one."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "fuzz" / "fuzz_checkpoint.py"
SECONDS = 8


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has wheels for Linux on x86_64 only")
def test_nothing_but_the_error_tree_comes_out_of_the_reader(tmp_path: Path):
    # -seed: the same inputs each time, as far as the machine's speed lets it get.
    command = [sys.executable, str(PROGRAM), "corpus", f"-max_total_time={SECONDS}", "-seed=6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    findings = [path for path in tmp_path.iterdir() if path.name.startswith(("crash-", "timeout-", "oom-"))]
    assert done.returncode == 0 and not findings, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(list((tmp_path / "corpus").iterdir())) > 6  # it found inputs that reach further than the sound ones
    print(re.findall(r"Done \d+ runs", done.stderr))
