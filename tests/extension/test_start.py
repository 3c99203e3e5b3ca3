"""A start is one file and one row: the laws hold for it, PEFT reads it, and a recipe trains with it."""

import parity.test_peft_files as parity
import pytest
import torch
from laws.test_laws import *  # noqa: F403
from laws.test_laws import cases
from zoo import PAIR_VARIANTS, zoo_and_inputs

import rankwise as rw
from rankwise.errors import SpecError
from rankwise.inits import INITS
from rankwise.methods import Method
from rankwise.scaling import SCALINGS

CASES = cases(["spectra"], PAIR_VARIANTS, list(SCALINGS))
pytestmark = parity.pytestmark


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(INITS, "spectra", Method("extension.methods.spectra:Spectra", "", "a power of the spectrum"))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_it_starts_from_a_power_of_the_weights_spectrum(power):
    zoo, _ = zoo_and_inputs(torch.float64)
    U, S, Vh = torch.linalg.svd(zoo.linear.weight.detach(), full_matrices=False)
    rw.attach(zoo, rw.LoRA(rank=2, init={"name": "spectra", "power": power}, target_modules=["linear"]))
    (pair,) = rw.pairs(zoo)
    expected = U[:, :2] * S[:2] ** power @ Vh[:2]
    torch.testing.assert_close(pair.scale * pair.B @ pair.A, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", PAIR_VARIANTS)
def test_peft_reads_it(variant, tmp_path):
    parity.test_peft_reads_what_we_write("spectra", variant, "rslora", tmp_path)


def test_a_recipe_trains_with_it(trained):
    result = trained(init={"name": "spectra", "power": 0.7})
    assert result.prepared.loaded.spec.init.power == 0.7


@pytest.mark.parametrize(
    ("init", "text"),
    [
        ("spektra", "did you mean 'spectra'"),
        ({"name": "spectra", "powr": 1.0}, "unknown option 'powr', known: .'power'.; did you mean 'power'"),
        ({"name": "spectra", "power": "1"}, "power must be of the kind of 0.5, found '1'"),
        ({"name": "spectra", "power": 3.0}, r"power must be a number in \(0, 2\]"),
    ],
)
def test_what_it_cannot_be_is_refused(init, text):
    with pytest.raises(SpecError, match=text):
        rw.LoRA(init=init)
