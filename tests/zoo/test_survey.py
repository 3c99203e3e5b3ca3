"""A few architectures, of every kind, through an adapter's life; `make zoo` does all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.survey import survey

ROOT = Path(__file__).parents[2]
QUICK = ("llama", "gpt2", "mixtral", "mamba", "bert", "bart", "vit", "resnet", "siglip", "wavlm", "clip")


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", QUICK)
def test_works(name: str) -> None:
    row = survey(name)
    assert row.outcome == "works", row


def test_none_is_wrong_and_the_document_is_up_to_date() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())["rows"]
    outcomes = [row["outcome"] for row in rows if row["outcome"] != "not built"]
    assert "wrong" not in outcomes
    assert outcomes.count("works") >= 0.95 * len(outcomes)
    subprocess.run([sys.executable, str(ROOT / "scripts" / "structures.py"), "--check"], check=True)
