"""What every new method is held to: the laws, for the cases that its file lists, and a recipe that names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from end_to_end.conftest import pairs_file, tiny
from laws.test_laws import CASE
from rich.console import Console
from safetensors.torch import load_file

from rankwise.train.recipe import Recipe, parse
from rankwise.train.run import run

__all__ = ["pairs_file", "tiny"]
SILENT = Console(quiet=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A law that a test file imports from tests/laws/test_laws.py runs for that file's own ``CASES``."""
    if set(CASE) <= set(metafunc.fixturenames):
        metafunc.parametrize(CASE, metafunc.module.CASES)


@pytest.fixture
def recipe(tiny: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe with these fields beside those that every run needs."""

    def make(**fields: Any) -> Recipe:
        values = {"model": str(tiny), "data": str(pairs_file), "rank": 4, "max_steps": 4, "save_steps": 2}
        return parse({**values, "output_dir": str(tmp_path / "whole"), "learning_rate": 1e-3, **fields})

    return make


@pytest.fixture
def trained(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Any]:
    """What a run of the recipe with these fields did; one that is resumed half way must have done it bit for bit."""

    def train(**fields: Any) -> Any:
        whole = run.train(recipe(**fields), SILENT)
        half_way = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2")}
        resumed = run.train(recipe(**fields, **half_way, output_dir=str(tmp_path / "resumed")), SILENT)
        expected, found = (load_file(result.adapter / "adapter_model.safetensors") for result in (whole, resumed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        return whole

    return train
