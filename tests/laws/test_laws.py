"""The laws of DESIGN.md over the literal tables: every initialisation × variant × scaling × dtype × kind of layer.

A new line in a table is picked up here without an edit.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from zoo import (
    DTYPES,
    LAYERS,
    PAIR_VARIANTS,
    RANK,
    TOLERANCE,
    Zoo,
    base_bytes,
    clone,
    fingerprint,
    perturb,
    relative,
    zoo_and_inputs,
)

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.inits import INITS
from rankwise.layers.kinds import base_matrix, kind_of
from rankwise.scaling import SCALINGS


def cases(inits: list[str], variants: list[str], scalings: list[str]) -> dict[tuple[str, str, str, str], None]:
    """Every init × variant in fp32 and bf16; every init, and every variant, with every other scaling and in fp64."""
    last = scalings[-1]
    both = [(init, variant, last, dtype) for init in inits for variant in variants for dtype in ("fp32", "bf16")]
    either = [(init, variants[0]) for init in inits] + [(inits[0], variant) for variant in variants]
    rest = [(*method, scaling, "fp32") for method in either for scaling in scalings]
    rest += [(*method, last, dtype) for method in either for dtype in DTYPES]
    return dict.fromkeys(both + rest)


CASE = ("init", "variant", "scaling", "dtype")
pytestmark = pytest.mark.parametrize(CASE, cases(list(INITS), PAIR_VARIANTS, list(SCALINGS)))


class Case:
    """A zoo with an adapter on each layer that the method serves, and the pretrained zoo beside it."""

    def __init__(self, init: str, variant: str, scaling: Any, dtype: str) -> None:
        self.spec = rw.LoRA(
            rank=RANK,
            alpha=3,
            init=init,
            variant=variant,
            scaling=scaling,
            target_modules=served(init, variant),
            dropout=0.3,
        )
        self.names = list(self.spec.target_modules)
        self.dtype = DTYPES[dtype]
        self.pretrained, self.inputs = zoo_and_inputs(self.dtype, self.names)
        self.model = self.attached()
        self.sites = list(Adapted.of(self.model).adapter_layers("default"))  # an init may give a layer no rank at all
        assert len(self.sites) > len(self.names) // 2
        self.model.eval()
        # A variant that does not add to the output works on the rounded sum again: twice the roundings.
        additive = all(layer.additive for layer in Adapted.of(self.model).adapter_layers("default").values())
        self.tolerance = TOLERANCE[self.dtype] * (1 if additive else 2)
        self.base_outputs = self.outputs(self.pretrained)

    def copy(self) -> "Case":
        """The same, to be changed."""
        case = copy.copy(self)
        case.model = clone(self.model)
        return case

    def attached(self, model: Any = None, spec: rw.LoRA | None = None) -> Any:
        """A copy of the pretrained zoo with the adapter on it, its init served with whatever it needs."""
        model, spec = model or clone(self.pretrained), spec or self.spec
        if spec.init.needs == "weights":  # stands for the model that was quantised to this one
            original, _ = zoo_and_inputs(torch.float64, self.names)
            perturb(original, 0.01)
            return rw.attach(model, spec, evidence=rw.weights(original, spec.target_modules))
        return rw.attach(model, spec, batches=[self.inputs])

    def outputs(self, model: Any = None) -> dict[str, Tensor]:
        with torch.no_grad():
            return (model or self.model)(**self.inputs).outputs

    def trained(self) -> "Case":
        """With tensors moved so far that every layer's output shows it."""
        for size in (0.3, 1.0):
            perturb(self.model, size)
            adapted = self.outputs()
            gaps = {name: relative(adapted[name], self.base_outputs[name]) for name in self.sites}
            if min(gaps.values()) > 4 * self.tolerance:
                return self
        raise AssertionError(f"{min(gaps, key=gaps.__getitem__)}: the adapter changes nothing")


@functools.cache
def served(init: str, variant: str) -> list[str]:
    """The layers that this method takes; the others it must refuse by name when it is planned, never later."""
    zoo, _ = zoo_and_inputs()
    kept = []
    for name in LAYERS:
        try:
            rw.plan(zoo, rw.LoRA(rank=RANK, init=init, variant=variant, target_modules=[name]))
        except rw.errors.SpecError as error:
            assert name in str(error)
            assert not name.startswith(("linear", "wide", "conv1d")), f"{init} × {variant} must serve {name}"
        else:
            kept.append(name)
    return kept


_built = functools.cache(Case)  # attaching is the dear part, and every law starts from it


@pytest.fixture
def case(init: str, variant: str, scaling: str, dtype: str) -> Case:
    """This parametrisation's case, fresh."""
    return _built(init, variant, scaling, dtype).copy()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    for name, y in expected.items():
        assert found[name].dtype == y.dtype, name
        assert torch.equal(found[name], y), f"{name}: off by {relative(found[name], y):.1e}"


def close(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for rounding. A sum's rounding error is relative to its terms: the pretrained output, the change."""
    for name, y in expected.items():
        y, y0 = y.double(), case.base_outputs[name].double()
        error = float((found[name].double() - y).norm() / max(y.norm(), y0.norm(), (y - y0).norm()))
        assert error <= case.tolerance, f"{name}: off by {error:.1e} > {case.tolerance:g}"


def test_the_start_leaves_the_output_unchanged(case):
    pretrained = case.base_outputs
    if not case.spec.init.keeps_function:
        assert any(relative(y, pretrained[n]) > case.tolerance for n, y in case.outputs().items())
        pytest.skip(f"init {type(case.spec.init).__name__} changes the function at the start: that is the method")
    same(case.outputs(), pretrained)
    same(case.outputs(case.model.train()), pretrained)  # with dropout


def test_every_site_can_learn_from_the_first_step(case):
    case.model(**case.inputs).loss.backward()
    for name, layer in Adapted.of(case.model).adapter_layers("default").items():
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert any(bool(g.any()) for g in grads), f"{name}: no gradient reaches its adapter"
        assert all(bool(torch.isfinite(g).all()) for g in grads), name
    assert all(p.grad is None for n, p in case.model.named_parameters() if ".rankwise." not in n)


def test_the_start_depends_on_the_seed_and_the_site_only(case):
    torch.manual_seed(12345)
    name = case.sites[-1]  # attached alone, after another global seed
    spec = rw.LoRA.from_dict({**case.spec.to_dict(), "target_modules": [name]})
    alone = Adapted.of(case.attached(spec=spec)).adapter_layers("default")[name]
    together = Adapted.of(case.model).adapter_layers("default")[name]
    if together.site.rank != alone.site.rank:
        pytest.skip(
            f"init {type(case.spec.init).__name__} gave this site another rank: the sites' evidence is weighed together"
        )
    for key, value in alone.state_dict().items():
        assert torch.equal(value, together.state_dict()[key]), key


def test_fold_is_what_adapt_does(case):
    """The layer whose weight is fold(W₀), in fp64 and with no adapter, is the oracle of the forward."""
    case.trained()
    oracle = clone(case.pretrained).double()
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in case.inputs.items()}
    for name, adapter in Adapted.of(case.model).adapter_layers("default").items():
        layer: Any = oracle.get_submodule(name)
        with torch.no_grad():
            folded = adapter.double().fold(base_matrix(layer))
            layer.weight.copy_(kind_of(layer).stored(layer, folded))
        adapter.to(torch.promote_types(case.dtype, torch.float32))
    close(case, case.outputs(), {k: y.detach() for k, y in oracle(**inputs).outputs.items()})


def test_merge_is_the_forward_and_unmerge_gives_every_bit_back(case):
    case.trained()
    adapted, before = case.outputs(), fingerprint(case.model)
    report = rw.merge(case.model)
    close(case, case.outputs(), adapted)
    assert set(report.sites) == set(case.sites)
    assert base_bytes(case.model) != base_bytes(case.pretrained)
    rw.unmerge(case.model)
    assert fingerprint(case.model) == before
    same(case.outputs(), adapted)
    rw.merge(case.model)
    rw.detach(case.model)
    assert base_bytes(case.model) == base_bytes(case.pretrained)


def test_a_merge_that_keeps_no_base_leaves_a_plain_model(case):
    case.trained()
    adapted = case.outputs()
    rw.merge(case.model, keep_base=False)
    close(case, case.outputs(), adapted)
    assert {n: type(m) for n, m in case.model.named_modules()} == {
        n: type(m) for n, m in case.pretrained.named_modules()
    }
    plain = Zoo(case.dtype, case.names)
    plain.load_state_dict(case.model.state_dict())
    same(case.outputs(plain), case.outputs())


def test_training_leaves_the_base_and_detach_gives_the_model_back(case):
    model = clone(case.pretrained)
    for path, module in model.named_modules():  # flags and modes that are not the default
        module.train(len(path) % 2 == 0)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    before = fingerprint(model)
    case.attached(model)
    assert [p.requires_grad for n, p in model.named_parameters() if ".rankwise." not in n].count(True) == 0
    optimizer = torch.optim.SGD(rw.trainable_parameters(model), lr=1e-2)
    for _ in range(2):
        model(**case.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert base_bytes(model) == base_bytes(case.pretrained)
    rw.detach(model)
    assert fingerprint(model) == before


def test_disabled_shows_the_pretrained_model(case):
    case.trained()
    adapted, pretrained = case.outputs(), case.base_outputs
    with rw.disabled(case.model):
        same(case.outputs(), pretrained)
        with rw.disabled(case.model):
            same(case.outputs(), pretrained)
        same(case.outputs(), pretrained)
    same(case.outputs(), adapted)


def test_save_then_load_is_the_identity(case, tmp_path: Path):
    case.trained()
    adapted = case.outputs()
    rw.save(case.model, tmp_path / "first")
    same(case.outputs(), adapted)  # saving changes nothing
    fresh = clone(case.pretrained).eval()
    rw.load(fresh, tmp_path / "first")
    close(case, case.outputs(fresh), adapted)
    assert not rw.trainable_parameters(fresh)
    rw.save(fresh, tmp_path / "second")  # and what was read is what was written
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("first", "second"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(second[key], value), key
    rw.detach(fresh)
    assert fingerprint(fresh) == fingerprint(clone(case.pretrained).eval())


def test_a_loaded_adapter_trains_on(case, tmp_path: Path):
    case.trained()
    rw.save(case.model, tmp_path)
    fresh = rw.load(clone(case.pretrained), tmp_path, trainable=True)
    close(case, case.outputs(fresh.eval()), case.outputs())
    assert all(layer.dropout == 0.3 for layer in Adapted.of(fresh).adapter_layers("default").values())
    fresh(**case.inputs).loss.backward()
    assert rw.trainable_parameters(fresh)
    assert all(p.grad is not None and p.grad.any() for p in rw.trainable_parameters(fresh))


def test_the_exact_state_resumes_bit_for_bit(case, tmp_path: Path):
    from rankwise.format.state import load_state, save_state

    case.trained()
    save_state(case.model, tmp_path)
    again = case.attached().eval()
    load_state(again, tmp_path)
    same(case.outputs(again), case.outputs())
    for key, value in case.model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
