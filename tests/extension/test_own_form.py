"""A variant that no PEFT reader knows: its own directory, the same tensors and function whoever loads it."""

from dataclasses import dataclass

import pytest
import torch
from laws.test_laws import *  # noqa: F403
from laws.test_laws import cases
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn
from zoo import clone, perturb

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import MissingTensor, SpecError, UnsupportedAdapter
from rankwise.format.state import load_state, save_state
from rankwise.inspection.inspection import inspect
from rankwise.methods import Method
from rankwise.variants import VARIANTS
from rankwise.variants.base import Variant
from rankwise.variants.lora import LoraLayer

CASES = cases(["kaiming"], ["vera"], ["lora", "rslora"])
pytestmark = []  # not the laws' own, which star imports bring
BASE = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 7))
SPEC = {"rank": 3, "alpha": 3, "variant": {"name": "vera", "d": 0.5}}


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(VARIANTS, "vera", Method("extension.methods.vera:Vera", "arXiv 2310.11454", "two vectors"))


def trained_model(**changes):
    model = rw.attach(clone(BASE), rw.LoRA(**SPEC, **changes))
    perturb(model, 0.3)
    return model


def vectors(model):
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


def test_it_is_the_papers_formula():
    model, x = trained_model(), torch.randn(5, 9)
    layer = Adapted.of(model).adapter_layers("default")["0"]
    change = torch.diag(layer.b) @ layer.B @ torch.diag(layer.d) @ layer.A
    expected = BASE[0](x) + x @ change.T
    torch.testing.assert_close(model[0](x), expected)
    assert rw.plan(BASE, rw.LoRA(**SPEC)).parameters == 3 + 12 + 3 + 7


def test_the_file_has_two_vectors_a_site_and_loads_as_the_same_variant(tmp_path):
    model, x = trained_model(seed=4), torch.randn(5, 9)
    rw.save(model, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"0.d", "0.b", "2.d", "2.b"}
    torch.manual_seed(99)  # the frozen pair depends on the spec's seed alone
    for trainable in (False, True):
        loaded = rw.load(clone(BASE), tmp_path, trainable=trainable)
        torch.testing.assert_close(loaded(x), model(x))
        assert Adapted.of(loaded).specs["default"] == Adapted.of(model).specs["default"]
        assert vectors(loaded) == ({"d", "b"} if trainable else set())
    save_state(model, tmp_path)
    again = rw.attach(clone(BASE), rw.LoRA(**SPEC, seed=4))
    load_state(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_inspect_shows_what_it_is(tmp_path):
    rw.save(trained_model(), tmp_path)
    found = inspect(tmp_path)
    assert found.peft_type == "RANKWISE_VERA"
    assert rw.LoRA.from_dict(found.spec) == rw.LoRA(**SPEC)
    assert [(site.name, site.kind, site.shape, site.rank, site.scale, site.change) for site in found.sites] == [
        ("0", "vera", (12, 9), 3, 1.0, None),
        ("2", "vera", (7, 12), 3, 1.0, None),
    ]
    assert found.parameters == 25
    assert not found.problems
    answers = {verdict.engine: verdict for verdict in found.engines}
    assert answers.pop("rankwise").answer == "yes"
    assert all(verdict.answer == "no" and "rankwise alone reads" in verdict.reason for verdict in answers.values())


def test_peft_refuses_the_directory_by_name(tmp_path):
    rw.save(trained_model(), tmp_path)
    with pytest.raises(KeyError, match="RANKWISE_VERA"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_a_process_that_lacks_the_row_refuses_the_directory_by_name(tmp_path, monkeypatch):
    rw.save(trained_model(), tmp_path)
    monkeypatch.delitem(VARIANTS, "vera")
    with pytest.raises(UnsupportedAdapter, match="variant 'vera', which has no row here"):
        rw.load(clone(BASE), tmp_path)
    assert "variant 'vera'" in inspect(tmp_path).problems[0]


@dataclass(frozen=True)
class Anchored(Variant):
    """LoRA's layer without LoRA's file: whether it has an anchor depends on the start."""

    def build(self, site, kind, weight, start, dropout):
        return LoraLayer(site, kind, dropout, start, anchored=start.needs_anchor)


def test_a_layer_that_no_file_could_give_back_is_refused_when_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "anchored", Method(f"{__name__}:Anchored", "none", "a pair of its own form"))
    rw.save(rw.attach(clone(BASE), rw.LoRA(rank=2, variant=Anchored())), tmp_path / "plain")
    with pytest.raises(UnsupportedAdapter, match="0: variant 'anchored' keeps 'start_A' only after some starts"):
        rw.save(rw.attach(clone(BASE), rw.LoRA(rank=2, variant=Anchored(), init="pissa")), tmp_path / "anchored")
    assert not (tmp_path / "anchored").exists()


def test_a_file_that_lacks_a_vector_is_refused(tmp_path):
    from safetensors.torch import save_file

    rw.save(trained_model(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != "2.b"}, file)
    with pytest.raises(MissingTensor, match=r"lacks 2\.b"):
        rw.load(clone(BASE), tmp_path)


def test_a_start_is_refused():
    with pytest.raises(SpecError, match="init 'pissa': variant 'vera' has a start of its own; leave init out"):
        rw.LoRA(variant="vera", init="pissa")


def test_a_recipe_trains_with_it(trained):
    result = trained(variant={"name": "vera", "d": 0.5}, alpha=4)
    assert vectors(result.prepared.loaded.model) == {"d", "b"}
    assert "What changed" in result.page.read_text()


def test_a_recipe_trains_an_adapter_behind_its_layers_whose_page_shows_no_change_of_a_weight(trained):
    result = trained(variant={"name": "bottleneck", "activation": "relu"}, target_modules=["down_proj"])
    assert vectors(result.prepared.loaded.model) == {"weight", "bias"}
    assert "What changed" not in result.page.read_text()
