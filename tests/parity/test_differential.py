"""A quick share of the random adapters of tests/differential.py; `make differential` tries thousands."""

import pytest
from differential import TWISTS, outcomes
from peft_written import SAID

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID]

PART = 14  # cases in a test


@pytest.mark.parametrize("part", range(2 * len(TWISTS) // PART))
def test_we_read_what_peft_writes_or_refuse_it_by_name(part: int):
    counts = outcomes("PEFT writes, rankwise reads", range(part * PART, (part + 1) * PART))
    print(dict(counts))
    assert counts["equal"] > 3


@pytest.mark.parametrize("part", range(3))
def test_peft_reads_what_we_write(part: int):
    counts = outcomes("rankwise writes, PEFT reads", range(part * PART, (part + 1) * PART))
    print(dict(counts))
    assert counts["equal"] > 3 and not counts["refused"]
