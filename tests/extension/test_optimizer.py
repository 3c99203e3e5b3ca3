"""An optimizer is a direction, a thin class and one row: the laws hold for it, recipes train with it and resume."""

from itertools import product

import laws.test_optimizers as laws
import pytest
import torch
from rich.console import Console

from rankwise.errors import RecipeError, SpecError
from rankwise.optim import OPTIMIZERS, OptimizerMethod
from rankwise.train.run import run

SILENT = Console(quiet=True)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    place = "extension.methods.sign_descent:SignDescentChoice"
    monkeypatch.setitem(OPTIMIZERS, "sign", OptimizerMethod(place, "arXiv 1802.04434", "sign descent", 1e-3))


def every_law():
    """Each law of tests/laws/test_optimizers.py that is one for every optimizer, with its other arguments."""
    for title, law in vars(laws).items():
        axes = {mark.args[0]: mark.args[1] for mark in getattr(law, "pytestmark", ())}
        if title.startswith("test_") and axes.pop("name", None) in (laws.NAMES, laws.PAIR_NAMES):
            for values in product(*axes.values()):
                yield pytest.param(
                    law, dict(zip(axes, values, strict=True)), id=f"{title}-{'-'.join(map(str, values))}"
                )


@pytest.mark.parametrize(("law", "arguments"), list(every_law()))
def test_the_laws(law, arguments):
    law("sign", **arguments)


def test_its_first_step_moves_every_entry_by_lr():
    model = laws.adapted("pissa", torch.float64)
    before = laws.trained(model)
    laws.run(model, laws.build("sign", model, lr=1e-2), 1)
    pairs = [move - old for move, old in zip(laws.trained(model)[:6], before[:6], strict=True)]
    assert all(torch.allclose(move.abs(), torch.tensor(1e-2, dtype=torch.float64)) for move in pairs)


def test_a_recipe_trains_with_it_and_resumes_bit_for_bit(trained):
    optimizer = trained(optimizer={"name": "sign", "beta": 0.5}, init="lora-ga").prepared.trainer.optimizer.optimizer
    assert type(optimizer).__name__ == "SignDescent"
    assert optimizer.param_groups[0]["beta"] == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"optim": "adafactor"}, RecipeError, "`optim`: goes with the optimizers adamw and lora-plus; with sign exp"),
        ({"adam_beta1": 0.8}, RecipeError, "`adam_beta1`: goes with"),
        ({"optimizer": {"name": "sign", "momentum": 0.9}}, SpecError, "'sign': unknown option 'momentum'"),
        ({"optimizer": "sgin"}, RecipeError, "expected one of adamw, .* did you mean 'sign'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(recipe, changes, error, text):
    with pytest.raises(error, match=text):
        run.prepare(run.load(recipe(**{"optimizer": "sign", **changes}), SILENT), SILENT)
