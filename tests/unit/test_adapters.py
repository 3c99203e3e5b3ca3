"""Adapters on a model: names, activation, detaching one, copies, pickles, and layers that are bypassed."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import LAYERS, base_bytes, fingerprint, left_as_it_was, perturb, relative, zoo_and_inputs

import rankwise as rw
from rankwise.errors import AttachError, EvidenceError, SiteNeverFired, SpecError
from rankwise.inits import INITS


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def trained(model: nn.Module, name: str, seed: int, **spec: Any) -> Tensor:
    """Attach, move; the change of the output on a fixed input."""
    rw.attach(model, rw.LoRA(rank=2, **spec), name=name)
    perturb(model, 0.5, seed)
    return model(X).detach()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------- named adapters


def test_one_of_several_is_active_and_only_it_is_trained():
    model = mlp()
    pretrained = model(X).detach()
    first, second = trained(model, "first", 1), trained(model, "second", 2, init="pissa")
    assert not torch.allclose(first, second)
    for name, expected in (("first", first), ("second", second)):
        assert rw.activate(model, name) is model
        torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
        trainable = {id(p) for p in rw.trainable_parameters(model)}
        assert trainable == {id(p) for pair in rw.pairs(model) for p in pair.parameters}
        assert trainable == {id(p) for pair in rw.pairs(model, name) for p in pair.parameters}
    with rw.disabled(model):
        torch.testing.assert_close(model(X), pretrained, rtol=0, atol=0)


def test_several_active_adapters_add_up():
    model = nn.Sequential(nn.Linear(6, 8))
    pretrained = model(X).detach()
    first, second = trained(model, "first", 1), trained(model, "second", 2, init="pissa", scaling="rslora")
    rw.activate(model, ["first", "second"])
    torch.testing.assert_close(model(X), first + second - pretrained)
    assert len(rw.trainable_parameters(model)) == 4
    both = model(X).detach()
    rw.activate(model, ["second", "first", "second"])  # a name twice counts once
    torch.testing.assert_close(model(X), both)
    rw.merge(model)
    torch.testing.assert_close(model(X), both)
    rw.detach(model)
    assert torch.equal(model(X), pretrained)


def test_adapters_on_different_layers():
    model = mlp()
    trained(model, "inner", 1, target_modules=["0"])
    trained(model, "outer", 2, target_modules=["2"])
    assert [p.name for p in rw.pairs(model)] == ["2"]
    rw.activate(model, "inner")
    assert [p.name for p in rw.pairs(model)] == ["0"]
    rw.activate(model, ["inner", "outer"])
    with pytest.raises(AttachError, match=r"name one adapter: 2 are active, the model has \['inner', 'outer'\]"):
        rw.pairs(model)
    assert [p.name for p in rw.pairs(model, "outer")] == ["2"]


def test_detaching_one_keeps_the_others():
    model = mlp()
    pristine = fingerprint(model)
    first = trained(model, "first", 1)
    trained(model, "second", 2, target_modules=["2"])
    rw.detach(model, "second")
    with pytest.raises(AttachError, match=r"name one adapter: 0 are active, the model has \['first'\]"):
        rw.pairs(model)
    rw.activate(model, "first")
    assert torch.equal(model(X), first)
    rw.detach(model, "first")
    assert fingerprint(model) == pristine


def test_detaching_one_leaves_nothing_on_layers_that_only_it_had():
    model = mlp()
    rw.attach(model, rw.LoRA(rank=2, target_modules=["0"]), name="inner")
    before = fingerprint(model[2])
    rw.attach(model, rw.LoRA(rank=2, target_modules=["2"]), name="outer")
    rw.detach(model, "outer")
    assert fingerprint(model[2]) == before
    assert not model[2]._forward_hooks


def test_pairs_are_live_and_effective():
    model = mlp()
    rw.attach(model, rw.LoRA(rank=2, alpha=6, init="pissa"))
    pair = rw.pairs(model)[1]
    assert (pair.name, pair.scale, pair.A.shape, pair.B.shape) == ("2", 3.0, (2, 8), (4, 2))
    A0, B0 = pair.A.detach().clone(), pair.B.detach().clone()
    assert A0.any() and B0.any()
    trained_A, trained_B = pair.parameters
    assert not trained_A.any() and not trained_B.any()  # δ, zero at the start
    with torch.no_grad():
        trained_A.add_(1.0)
    torch.testing.assert_close(pair.A, A0 + 1.0)
    delta = pair.layer.delta().dense()
    torch.testing.assert_close(delta, 3.0 * (pair.B @ pair.A - B0 @ A0))


def test_trainable_parameters_are_the_active_adapters():
    model = mlp()
    rw.attach(model, rw.LoRA(rank=2))
    expected = [p for n, p in model.named_parameters() if "lora_" in n]
    assert {id(p) for p in rw.trainable_parameters(model)} == {id(p) for p in expected}
    assert len(expected) == 4
    assert all(p.dtype == torch.float32 for p in rw.trainable_parameters(rw.attach(mlp().bfloat16(), rw.LoRA(rank=2))))


def test_the_layers_keep_their_class_their_keys_and_their_weight():
    model = mlp()
    keys, weights = list(model.state_dict()), [id(p) for p in model.parameters()]
    rw.attach(model, rw.LoRA(rank=2))
    assert type(model[0]) is nn.Linear
    assert [k for k in model.state_dict() if ".rankwise." not in k] == keys
    assert [id(p) for n, p in model.named_parameters() if ".rankwise." not in n] == weights


def test_keyword_arguments_reach_the_adapter():
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv1d = nn.Linear(6, 6), LAYERS["conv1d"][0]()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv1d(x=torch.cat([self.linear(input=x), x], -1))

    model = ByName()
    spec = rw.LoRA(rank=2, init="lora-ga")
    pretrained = model(X).detach()
    rw.attach(model, spec, batches=[X], loss=lambda m, x: m(x).square().mean())
    assert torch.equal(model(X), pretrained)
    perturb(model, 0.5)
    adapted = model(X).detach()
    assert not torch.allclose(adapted, pretrained)
    rw.merge(model)
    torch.testing.assert_close(model(X), adapted)


def test_an_adapters_mode_follows_its_layer():
    model = mlp()
    model[0].eval()
    rw.attach(model, rw.LoRA(rank=2, dropout=0.5, init="init-b"))
    perturb(model, 0.5)
    model[0].eval()
    alone = model[0]
    assert torch.equal(alone(X), alone(X))
    model.train()
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))


# ------------------------------------------------------------------------------------- copies, pickles, dtypes


@pytest.mark.parametrize("anchor", ["frozen", "fold"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_whole_and_independent(how, init: str, anchor: str):
    model = mlp()
    pretrained = fingerprint(model)
    rw.attach(model, rw.LoRA(rank=2, init=init, anchor=anchor))
    perturb(model, 0.5)
    adapted = model(X).detach()
    twin = how(model)
    assert torch.equal(twin(X), adapted)
    perturb(twin, 0.5, 9)
    assert torch.equal(model(X), adapted)
    assert not torch.allclose(twin(X), adapted)
    rw.detach(twin)
    assert fingerprint(twin) == pretrained
    assert torch.equal(model(X), adapted)
    rw.merge(model)
    torch.testing.assert_close(how(model)(X), adapted)
    rw.detach(how(model))
    rw.unmerge(model)
    rw.detach(model)
    assert fingerprint(model) == pretrained


def test_a_copy_before_the_first_forward_still_watches_it():
    model = copy.deepcopy(rw.attach(Bypassed(), rw.LoRA(rank=2, target_modules=["used", "bypassed"])))
    with pytest.raises(SiteNeverFired):
        model(X)


def test_a_model_goes_with_its_last_reference():
    model = rw.attach(mlp(), rw.LoRA(rank=2, target_modules=["0"], modules_to_save=["2"]))
    model(X)
    with rw.disabled(model):
        model(X)
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_casting_the_whole_model():
    model = mlp()
    rw.attach(model, rw.LoRA(rank=2, init="pissa"))
    perturb(model, 0.5)
    adapted = model(X).detach()
    assert relative(model.double()(X.double()), adapted) < 1e-6
    assert relative(model.bfloat16()(X.bfloat16()), adapted) < 2e-2


def test_a_parameter_that_came_after_attach_survives_detach():
    model = mlp()
    pristine = base_bytes(model)
    rw.attach(model, rw.LoRA(rank=2))
    model.add_module("3", nn.Linear(4, 2))
    rw.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    del model[3]
    assert base_bytes(model) == pristine


# ------------------------------------------------------------------------------------------------ bypassed layers


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.bypassed = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.bypassed.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.attention(x, x, x)[0]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Experts(nn.Module):
    """Tokens go to one expert; the others are idle."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 3), nn.ModuleList(Expert() for _ in range(3))
        self.chosen = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.chosen](x) * self.router(x).softmax(-1)[..., self.chosen, None]


def test_multihead_attention_goes_past_its_out_proj():
    model = Attention()
    rw.attach(model, rw.LoRA(rank=2, target_modules=["inner", "out_proj"]))
    with pytest.raises(
        SiteNeverFired,
        match=r"^attention.out_proj: a forward .* past this layer.*detach and name it in exclude_modules",
    ):
        model(torch.randn(2, 3, 8))
    rw.detach(model)
    rw.attach(model, rw.LoRA(rank=2))
    model(torch.randn(2, 3, 8)).sum().backward()
    assert [p.name for p in rw.pairs(model)] == ["inner"]


def test_a_layer_of_the_model_itself_that_is_bypassed():
    model = rw.attach(Bypassed(), rw.LoRA(rank=2, target_modules=["bypassed"]))
    with pytest.raises(SiteNeverFired, match=r"^bypassed: "):
        model(X)
    with rw.disabled(model), pytest.raises(SiteNeverFired):
        model(X)


def test_detaching_the_adapter_of_the_bypassed_layer_ends_the_complaint():
    model = Attention()
    rw.attach(model, rw.LoRA(rank=2, target_modules=["inner"]), name="good")
    rw.attach(model, rw.LoRA(rank=2, target_modules=["out_proj"]), name="bad")
    with pytest.raises(SiteNeverFired):
        model(torch.randn(2, 3, 8))
    rw.detach(model, "bad")
    rw.activate(model, "good")
    model(torch.randn(2, 3, 8))


def test_an_expert_that_no_token_chose_is_no_error():
    model = rw.attach(Experts(), rw.LoRA(rank=2))
    for chosen in (1, 1, 0, 2):
        model.chosen = chosen
        model(X).sum().backward()
    assert all(p.grad is not None for p in rw.trainable_parameters(model))
    assert not model._forward_hooks  # seen all: the watch is over


def test_an_expert_that_ran_before_it_was_adapted_is_no_error():
    model = rw.attach(Experts(), rw.LoRA(rank=2, target_modules=["up"]), name="up")
    model(X)
    rw.attach(model, rw.LoRA(rank=2, target_modules=["down"]), name="down")
    model.chosen = 0  # the expert that ran is idle now
    model(X)


def test_a_merged_model_has_no_layers_to_watch():
    model = rw.attach(Experts(), rw.LoRA(rank=2))
    rw.merge(model)
    model(X)
    rw.unmerge(model)
    model.chosen = 0
    model(X)
    bypassed = rw.attach(Bypassed(), rw.LoRA(rank=2, target_modules=["bypassed"]))
    rw.merge(bypassed)
    bypassed(X)  # whose weight is right
    rw.unmerge(bypassed)
    with pytest.raises(SiteNeverFired):
        bypassed(X)


def test_the_watch_costs_nothing_after_the_first_forward():
    model = rw.attach(Attention(), rw.LoRA(rank=2, exclude_modules=["out_proj"]))
    assert len(model._forward_hooks) == 1
    model(torch.randn(2, 3, 8))
    assert not model._forward_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


# -------------------------------------------------------------------------------------------------------- bad input


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_the_same_name_twice():
    model = rw.attach(mlp(), rw.LoRA(rank=2))
    with left_as_it_was(model), pytest.raises(AttachError, match=r"already carries an adapter 'default'.*another name"):
        rw.attach(model, rw.LoRA(rank=2))


@pytest.mark.parametrize("name", ["", "a.b", "values", "train", "forward"])
def test_names_that_torch_cannot_hold(name: str, tmp_path):
    model = mlp()
    with (
        left_as_it_was(model),
        pytest.raises(AttachError, match=rf"adapter name {name!r} cannot be used.*choose another"),
    ):
        rw.attach(model, rw.LoRA(rank=2), name=name)
    rw.save(rw.attach(copy.deepcopy(model), rw.LoRA(rank=2)), tmp_path)
    with left_as_it_was(model), pytest.raises(AttachError, match=rf"adapter name {name!r} cannot be used"):
        rw.load(model, tmp_path, name=name)


def test_unknown_names():
    model = rw.attach(mlp(), rw.LoRA(rank=2), name="french")
    for call in (rw.activate, rw.detach, rw.pairs):
        with (
            left_as_it_was(model),
            pytest.raises(AttachError, match=r"no adapter 'frensh'.*\['french'\]; did you mean 'french'\?"),
        ):
            call(model, "frensh")
    with left_as_it_was(model), pytest.raises(AttachError, match=r"no adapter named.*rankwise.disabled"):
        rw.activate(model, [])


def test_a_model_without_adapters(tmp_path):
    model = mlp()
    for call in (rw.detach, rw.disabled, rw.pairs, rw.merge, rw.unmerge):
        with left_as_it_was(model), pytest.raises(AttachError, match=r"carries no adapter: call rankwise.attach"):
            call(model)
    with pytest.raises(AttachError, match="carries no adapter"):
        rw.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(AttachError, match="carries no adapter"):
        rw.activate(model, "default")


def test_a_part_of_an_adapted_model():
    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    rw.attach(model, rw.LoRA(rank=2))
    with left_as_it_was(model), pytest.raises(AttachError, match=r"part of a model that carries adapters.*whole model"):
        rw.attach(model[0], rw.LoRA(rank=2))


class Wrapper(nn.Module):
    """As DistributedDataParallel wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_a_wrapped_model_is_seen_through(tmp_path):
    model = mlp()
    pristine = fingerprint(model)
    rw.attach(model, rw.LoRA(rank=2))
    wrapped = Wrapper(model)
    rw.attach(wrapped, rw.LoRA(rank=2, target_modules=["0"]), name="second")
    perturb(wrapped, 0.5)
    adapted = wrapped(X).detach()
    assert [p.name for p in rw.pairs(wrapped)] == ["0"]
    rw.save(wrapped, tmp_path)
    rw.merge(wrapped)
    torch.testing.assert_close(wrapped(X), adapted)
    rw.detach(wrapped)
    assert fingerprint(model) == pristine
    torch.testing.assert_close(rw.load(model, tmp_path)(X), adapted)


NEEDS_DATA = [name for name, entry in INITS.items() if entry.cls.needs != "nothing"]


@pytest.mark.parametrize("init", NEEDS_DATA)
def test_an_init_without_what_it_must_see(init: str):
    model = mlp()
    kind = INITS[init].cls.__name__
    with (
        left_as_it_was(model),
        pytest.raises(EvidenceError, match=rf"init {kind} starts from .*(batches|reference)=.*evidence="),
    ):
        rw.attach(model, rw.LoRA(rank=2, init=init))


def test_evidence_that_lacks_a_site():
    model = mlp()
    seen = rw.gradients(model, [X], ["0"], loss=_loss)
    with left_as_it_was(model), pytest.raises(EvidenceError, match=r"evidence lacks 1 of 2 sites, the first is '2'"):
        rw.attach(model, rw.LoRA(rank=2, init="lora-ga"), evidence=seen)


def test_a_layer_without_gradient_or_with_a_bad_one_leaves_the_model_as_it_was():
    model = nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)}).train()
    model.idle.eval()
    model.used.bias.requires_grad_(False)
    model.used.register_forward_hook(_silent)
    spec = rw.LoRA(rank=2, init="lora-ga", target_modules=["used", "idle"])
    with left_as_it_was(model), pytest.raises(rw.errors.NoGradient, match=r"^idle: no gradient.*exclude_modules"):
        rw.attach(model, spec, batches=[X], loss=lambda m, x: m.used(x).square().mean())
    with left_as_it_was(model), pytest.raises(rw.errors.NonFiniteGradient, match=r"batch 0: the loss is nan"):
        rw.attach(model, spec, batches=[X * float("nan")], loss=lambda m, x: m.idle(m.used(x)).square().mean())
    rw.attach(model, spec, batches=[X], loss=lambda m, x: m.idle(m.used(x)).square().mean())
    with left_as_it_was(model), pytest.raises(rw.errors.NonFiniteGradient):  # and beside another adapter
        rw.attach(model, spec, batches=[X * float("nan")], loss=lambda m, x: m.idle(m.used(x)).sum(), name="second")


def _silent(module: nn.Module, args: Any, output: Tensor) -> None:
    """A user's own hook, which must survive."""


def test_a_start_of_zeros_is_refused():
    """Both halves zero: no gradient would ever flow, so the adapter would stay what it is."""
    model = mlp()
    nn.init.zeros_(model[2].weight)
    with left_as_it_was(model), pytest.raises(SpecError, match=r"^2: .*Pissa.*zero.*exclude"):
        rw.attach(model, rw.LoRA(rank=2, init="pissa"))


def test_attaching_uses_no_global_randomness():
    for init in INITS:
        if INITS[init].cls.needs == "weights":
            continue  # needs a second model; the laws cover that its start depends on seed and site only
        zoo, inputs = zoo_and_inputs(names=["linear", "conv2d"])
        state = torch.get_rng_state()
        rw.attach(zoo, rw.LoRA(rank=2, init=init, target_modules=["linear", "conv2d"]), batches=[inputs])
        assert torch.equal(torch.get_rng_state(), state), init


def test_a_weight_beyond_what_fp32_can_count_is_saved(tmp_path):
    """2²⁴ numbers and more, as every layer of a 7 B model has."""
    wide = torch.nn.Sequential(torch.nn.Linear(1, 2**24 + 3, bias=False, dtype=torch.bfloat16))
    rw.attach(wide, rw.LoRA(rank=1))
    rw.save(wide, tmp_path)
    rw.load(rw.detach(wide), tmp_path)
