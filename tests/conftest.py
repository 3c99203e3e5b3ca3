"""What holds for every test: shapes checked at run time, one thread, one seed, no network."""

import gc
import os
from typing import Any

# Before any import reads them. A test that reaches for a hub must fail, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

# Also before the first import of rankwise: from here on, every annotation such as Float[Tensor, "out r"] is checked.
# The tower: an int is welcome where a float is asked for, as everywhere in Python's typing (PEP 484).
install_import_hook("rankwise", "typecheck.check")

import pytest
import torch
from hypothesis import HealthCheck, settings

collect_ignore = ["fuzz/fuzz_checkpoint.py"]  # a program; tests/unit/test_fuzz.py runs it

# Times vary on a shared machine; an example that fails must fail again.
settings.register_profile(
    "rankwise", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("rankwise")

# The tensors here are tiny, and under xdist one process per core runs: more threads would only get in each other's way.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported stays until the end: without this, each collection walks through a million objects of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state, whatever ran before it in the process."""
    torch.manual_seed(0)


@pytest.fixture
def smollm2() -> tuple[Any, Any]:
    """The built-in 135 M model in fp32 and its tokenizer, fresh: a test may do to them what it likes."""
    from rankwise.train.model.pretrained import load_pretrained

    return load_pretrained("smollm2-135m")
