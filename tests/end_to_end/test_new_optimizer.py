"""An optimizer of one's own is a direction, a thin class and one row: recipes train with it, and resume exactly."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from rankwise.errors import RecipeError, SpecError
from rankwise.methods import Method
from rankwise.optim import OPTIMIZERS, PairOptimizer
from rankwise.optim.choice import choice_of
from rankwise.pair import Pair
from rankwise.train import recipe as recipes
from rankwise.train.run import run

SILENT = Console(quiet=True)


def direction(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scale: float, state: dict[str, Any], *, beta: float
) -> tuple[Tensor, Tensor]:
    """The sign of the gradients' running mean."""
    for name, gradient in (("A", grad_A), ("B", grad_B)):
        state.setdefault(name, torch.zeros_like(gradient)).lerp_(gradient, 1 - beta)
    return state["A"].sign(), state["B"].sign()


class SignDescent(PairOptimizer):
    """Every entry moves by lr."""

    def __init__(
        self,
        pairs: Iterable[Pair],
        lr: float = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
    ) -> None:
        super().__init__(pairs, direction, {"beta": beta}, lr=lr, weight_decay=weight_decay, others=others)


SignDescentChoice = choice_of(SignDescent)


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sign", Method(f"{__name__}:SignDescentChoice", "", "sign descent"))


@pytest.fixture
def make(tiny: Path, pairs_file: Path, tmp_path: Path):
    def make(**changes: Any):
        values = {"model": str(tiny), "data": str(pairs_file), "rank": 4, "init": "lora-ga", "max_steps": 4}
        values |= {"output_dir": str(tmp_path / "whole"), "save_steps": 2, "learning_rate": 1e-3}
        return recipes.parse(values | {"optimizer": {"name": "sign", "beta": 0.5}} | changes)

    return make


def test_a_recipe_trains_with_it_and_resumes_bit_for_bit(make, tmp_path):
    whole = run.train(make(), SILENT)
    optimizer = whole.prepared.trainer.optimizer.optimizer
    assert isinstance(optimizer, SignDescent)
    assert optimizer.param_groups[0]["beta"] == 0.5
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run.train(make(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint), SILENT)
    expected, found = (load_file(result.adapter / "adapter_model.safetensors") for result in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"optim": "adafactor"}, RecipeError, "`optim`: goes with the optimizers adamw and lora-plus; with sign exp"),
        ({"adam_beta1": 0.8}, RecipeError, "`adam_beta1`: goes with"),
        ({"optimizer": {"name": "sign", "momentum": 0.9}}, SpecError, "'sign': unknown option 'momentum'"),
        ({"optimizer": "sgin"}, SpecError, "expected one of adamw, .* did you mean 'sign'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(make, changes, error, text):
    with pytest.raises(error, match=text):
        run.prepare(run.load(make(**changes), SILENT), SILENT)
