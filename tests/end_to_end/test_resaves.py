"""Adapters saved over each other by a process that is killed again and again, while another one reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_an_adapter_that_is_saved_over_and_over_is_never_mixed_nor_lost(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "resaves.py"), "--kills", "40", "--work", str(tmp_path)]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == 40
    assert counts["read while it was saved"] >= 40
    assert counts["of these mixed"] == counts["mixed after a kill"] == 0
    assert counts["of these refused"] == counts["refused after a kill"] == 0
