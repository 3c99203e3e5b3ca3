"""A variant that PEFT reads as plain LoRA and never trains its A, wherever it comes from."""

import json

import parity.test_peft_files as parity
import pytest
import torch
from laws.test_laws import *  # noqa: F403
from laws.test_laws import cases
from safetensors.torch import load_file
from torch import nn
from zoo import clone, perturb

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import SpecError, UnsupportedAdapter
from rankwise.format.state import load_state, save_state
from rankwise.inspection.inspection import inspect
from rankwise.methods import Method
from rankwise.optim import LoraPro
from rankwise.variants import VARIANTS

CASES = cases(["init-b", "pissa", "loftq"], ["frozen-a"], ["rslora"])
pytestmark = parity.pytestmark
BASE = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 7))


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(
        VARIANTS, "frozen-a", Method("extension.methods.frozen_a:FrozenA", "arXiv 2308.03303", "B only")
    )


def attached(init="pissa", name="default", model=None):
    return rw.attach(model or clone(BASE), rw.LoRA(rank=3, init=init, variant="frozen-a"), name=name)


def only_B_is_trained(model):
    layers = Adapted.of(model).adapter_layers(Adapted.of(model).active[0])
    trained = {id(layer.lora_B) for layer in layers.values()}
    return trained == {id(p) for p in rw.trainable_parameters(model)}


@pytest.mark.parametrize("init", ["kaiming", "init-b", "pissa"])
def test_A_is_never_trained(init, tmp_path):
    model = attached(init)
    assert only_B_is_trained(model)
    assert rw.plan(clone(BASE), rw.LoRA(rank=3, variant="frozen-a")).parameters == 3 * (12 + 7)
    attached(init, "second", model)
    rw.activate(model, "default")
    assert only_B_is_trained(model)
    with rw.disabled(model):
        pass
    rw.merge(model)
    rw.unmerge(model)
    assert only_B_is_trained(model)
    perturb(model, 0.3)
    save_state(model, tmp_path / "state")
    again = attached(init)
    load_state(again, tmp_path / "state")
    assert only_B_is_trained(again)
    rw.save(model, tmp_path / "first")
    for directory in ("first", "second"):
        loaded = rw.load(clone(BASE), tmp_path / directory, trainable=True)
        assert only_B_is_trained(loaded)
        rw.save(loaded, tmp_path / "second")


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_trained_file_has_the_A_that_it_started_from(init, tmp_path):
    model = attached(init)
    before = {pair.name: pair.A.detach().clone() for pair in rw.pairs(model)}
    optimizer = torch.optim.AdamW(rw.param_groups(model, lr=0.1, lr_ratio=4, weight_decay=0.1))
    for _ in range(3):
        model(torch.randn(5, 9)).square().mean().backward()
        optimizer.step()
    rw.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for path, A in before.items():
        assert torch.equal(tensors[f"base_model.model.{path}.lora_A.weight"], A)


def test_what_the_file_is_can_be_read_without_a_model(tmp_path):
    rw.save(attached(), tmp_path)
    found = inspect(tmp_path)
    assert not found.problems
    assert found.spec["variant"] == "frozen-a"
    assert {site.rank for site in found.sites} == {3}  # not 6, although the start was anchored


def test_a_process_that_lacks_the_row_says_so_and_loads_the_same_function(tmp_path, monkeypatch, caplog):
    model, x = attached(), torch.randn(5, 9)
    perturb(model, 0.3)
    rw.save(model, tmp_path)
    expected = model(x)
    monkeypatch.delitem(VARIANTS, "frozen-a")
    torch.testing.assert_close(rw.load(clone(BASE), tmp_path)(x), expected)
    assert "variant: expected one of lora, dora, adalora, bottleneck, found 'frozen-a'" in caplog.text
    assert inspect(tmp_path).spec["variant"] == "lora"


def test_a_tensor_that_no_reader_would_know_of_is_refused_when_it_is_saved(tmp_path, monkeypatch):
    variant = VARIANTS["frozen-a"].cls
    model = attached()
    layer = type(Adapted.of(model).adapter_layers("default")["0"])
    monkeypatch.setattr(layer, "extra_tensors", lambda self: {"lora_gain": self.lora_B[:, 0]})
    monkeypatch.setattr(variant, "tensors", ("lora_gain",))
    with pytest.raises(UnsupportedAdapter, match="0: variant 'frozen-a' gives the file lora_gain, of which no reader"):
        rw.save(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_variant_is_kept_although_another_method_is_unknown(tmp_path, monkeypatch):
    rw.save(attached(), tmp_path)
    record = json.loads((tmp_path / "rankwise.json").read_text())
    record["spec"]["init"] = "of-tomorrow"
    (tmp_path / "rankwise.json").write_text(json.dumps(record))
    assert only_B_is_trained(rw.load(clone(BASE), tmp_path, trainable=True))


def test_an_optimizer_of_pairs_refuses_half_a_pair():
    with pytest.raises(SpecError, match="0: expected both halves of the pair to be trainable, found a frozen one"):
        LoraPro.for_model(attached(), lr=1e-3)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_peft_reads_it_on_every_kind_of_layer(init, tmp_path):
    parity.test_peft_reads_what_we_write(init, "frozen-a", "rslora", tmp_path)


def test_a_recipe_trains_with_it(trained):
    result = trained(variant="frozen-a", init="pissa")
    assert only_B_is_trained(result.prepared.loaded.model)
