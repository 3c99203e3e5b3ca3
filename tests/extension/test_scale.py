"""A scale is one file and one row: s is kept in every file, also where nobody knows the formula."""

import json

import parity.test_peft_files as parity
import pytest
import torch
from laws.test_laws import *  # noqa: F403
from laws.test_laws import cases
from peft import PeftModel
from torch import nn
from zoo import PAIR_VARIANTS, clone, perturb

import rankwise as rw
from rankwise.methods import Method
from rankwise.scaling import SCALINGS

CASES = cases(["pissa"], ["lora", "dora"], ["three-quarters"])
pytestmark = parity.pytestmark
SPEC = {"rank": 5, "alpha": 3, "init": "pissa", "rank_pattern": {"2": 3}, "alpha_pattern": {"4": 7.5}}


@pytest.fixture(autouse=True)
def row(monkeypatch):
    row = Method("extension.methods.three_quarters:ThreeQuarters", "", "α/r^¾")
    monkeypatch.setitem(SCALINGS, "three-quarters", row)


def changes(model):
    return {pair.name: pair.layer.delta().dense().detach() for pair in rw.pairs(model)}


@pytest.fixture
def saved(tmp_path):
    """The pretrained model, what training changed in each weight, and the adapter's directory."""
    base = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    model = rw.attach(clone(base), rw.LoRA(scaling="three-quarters", **SPEC))
    assert [pair.scale for pair in rw.pairs(model)] == [3 / 5**0.75, 3 / 3**0.75, 7.5 / 5**0.75]
    perturb(model, 0.3)
    rw.save(model, tmp_path)
    return base, changes(model), tmp_path


def test_what_is_loaded_is_what_was_saved(saved):
    base, expected, directory = saved
    model = rw.load(clone(base), directory)
    torch.testing.assert_close(changes(model), expected, rtol=1e-6, atol=1e-6)
    rw.save(model, directory / "again")
    again = rw.load(clone(base), directory / "again", trainable=True)
    torch.testing.assert_close(changes(again), expected, rtol=1e-6, atol=1e-6)
    assert json.loads((directory / "again" / "rankwise.json").read_text())["spec"]["scaling"] == "three-quarters"


def test_a_process_that_lacks_the_row_loads_the_same_function(saved, monkeypatch, caplog):
    base, expected, directory = saved
    monkeypatch.delitem(SCALINGS, "three-quarters")
    model = rw.load(clone(base), directory)
    torch.testing.assert_close(changes(model), expected, rtol=1e-6, atol=1e-6)
    assert "scaling: expected one of lora, rslora, found 'three-quarters'" in caplog.text
    rw.save(model, directory / "again")
    torch.testing.assert_close(changes(rw.load(base, directory / "again")), expected, rtol=1e-6, atol=1e-6)


def test_peft_reads_the_same_change(saved):
    base, expected, directory = saved
    peft = PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False)
    for path, change in expected.items():
        found = peft.base_model.model.get_submodule(path).get_delta_weight("default").detach()
        torch.testing.assert_close(found.double(), change, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", PAIR_VARIANTS)
def test_peft_reads_it_on_every_kind_of_layer(variant, tmp_path):
    parity.test_peft_reads_what_we_write("pissa", variant, "three-quarters", tmp_path)


def test_a_recipe_trains_with_it(trained):
    result = trained(scaling="three-quarters", alpha=8)
    assert {site.scale for site in result.prepared.loaded.sites} == {8 / 4**0.75}
