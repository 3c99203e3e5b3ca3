"""The first step's cosine: formulas against autograd and a real optimizer's step."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.analysis import Alignment, alignment, every_first_step, first_step, full_step
from rankwise.errors import AttachError, EvidenceError, SpecError
from rankwise.variants.lora import LoraLayer

OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def tiny(init: str = "kaiming", **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5))
    spec = rw.LoRA(rank=2, init=init, target_modules=("0", "2"), **options)
    return rw.attach(model, spec, batches=[torch.randn(9, 7)], loss=mean_square)


@given(seed=st.integers(0, 10_000), optimizer=st.sampled_from(["sgd", "adamw"]), zero=st.sampled_from(["", "A", "B"]))
def test_formula_is_the_literal_one(seed: int, optimizer: str, zero: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    out, into, r, s = 6, 9, 3, 1.7
    G, A, B = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((out, into), (r, into), (out, r)))
    A, B = A * (zero != "A"), B * (zero != "B")
    if optimizer == "sgd":
        D, F = s**2 * (B @ B.T @ G + G @ A.T @ A), G
    else:
        D, F = s * (B @ torch.sign(B.T @ G) + torch.sign(G @ A.T) @ A), torch.sign(G)
    torch.testing.assert_close(first_step(G, A, B, s, optimizer).dense(), D)
    torch.testing.assert_close(full_step(G, optimizer), F)
    got = alignment(G, A, B, s, optimizer)
    assert got.cosine == pytest.approx(float((D * F).sum() / D.norm() / F.norm()), abs=1e-12)
    assert got.relative_size == pytest.approx(float(D.norm() / F.norm()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("init", ["kaiming", "init-b", "pissa", "lora-ga"])
def test_prediction_is_what_the_optimizer_then_does(init: str, optimizer: str) -> None:
    """Steps of a tiny rate, of the adapter and of every weight: their cosine and relative size, measured."""
    torch.set_default_dtype(torch.float64)
    try:
        model, lr = tiny(init), 1e-8
        batches = [torch.randn(9, 7), torch.randn(9, 7)]
        predicted = every_first_step(model, batches, (optimizer,), mean_square)[optimizer]
        full = copy.deepcopy(model)
        rw.detach(full)
        weights = {name: full.get_submodule(name).weight for name in predicted}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        start = {pair.name: pair.layer.delta().dense().detach() for pair in rw.pairs(model)}
        for net, parameters in ((full, list(weights.values())), (model, rw.trainable_parameters(model))):
            torch.stack([mean_square(net, x) for x in batches]).mean().backward()
            options = {"weight_decay": 0.0, "eps": 1e-30} if optimizer == "adamw" else {}
            OPTIMIZERS[optimizer](parameters, lr=lr, **options).step()
        for pair in rw.pairs(model):
            D = pair.layer.delta().dense().detach() - start[pair.name]
            F = weights[pair.name].detach() - before[pair.name]
            got = predicted[pair.name]
            assert got.cosine == pytest.approx(float((D * F).sum() / D.norm() / F.norm()), abs=2e-4)
            assert got.relative_size == pytest.approx(float(D.norm() / F.norm()), rel=2e-4)
            assert got.cosine > 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_lora_ga_steps_as_full_fine_tuning_when_2r_covers_the_gradient() -> None:
    model = nn.Sequential(nn.Linear(7, 4, bias=False))
    x = [torch.randn(9, 7)]
    rw.attach(model, rw.LoRA(rank=2, init="lora-ga", target_modules=("0",)), batches=x, loss=mean_square)
    cosines = rw.analysis.first_step_alignment(model, x, loss=mean_square)
    assert cosines["0"] == pytest.approx(1.0, abs=1e-5)


def test_lora_ga_is_better_aligned_than_a_random_start() -> None:
    x = [torch.randn(9, 7)]
    cosines = [
        rw.analysis.first_step_alignment(
            rw.attach(copy.deepcopy(base), rw.LoRA(rank=2, init=init), batches=x, loss=mean_square), x, loss=mean_square
        )
        for base in [nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 8))]
        for init in ("lora-ga", "kaiming")
    ]
    for name in cosines[0]:
        assert cosines[0][name] > cosines[1][name] + 0.1


def test_gradients_are_of_the_adapted_model_and_nothing_is_disturbed() -> None:
    model = tiny(dropout=0.5).train()
    x = [torch.randn(9, 7)]
    at_start = rw.analysis.first_step_alignment(model, x, loss=mean_square)
    with torch.no_grad():
        for pair in rw.pairs(model):
            pair.parameters[1].normal_()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    moved = rw.analysis.first_step_alignment(model, x, loss=mean_square)
    assert moved == rw.analysis.first_step_alignment(model, x, loss=mean_square), "dropout takes no part"
    assert moved != at_start
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {id(p) for p in rw.trainable_parameters(model)} == {id(p) for q in rw.pairs(model) for p in q.parameters}


def test_a_pair_that_cannot_move_has_no_direction() -> None:
    zero = torch.zeros(2, 3)
    assert alignment(torch.ones(4, 3), zero, torch.zeros(4, 2), 1.0, "adamw") == Alignment(0.0, 0.0)


def test_refusals() -> None:
    model, x = tiny(), [torch.randn(9, 7)]
    with pytest.raises(SpecError, match="did you mean 'adamw'"):
        rw.analysis.first_step_alignment(model, x, "adam", mean_square)
    with pytest.raises(AttachError, match="carries no adapter"):
        rw.analysis.first_step_alignment(nn.Linear(2, 2), x, "sgd", mean_square)
    with pytest.raises(EvidenceError, match="batches is empty"):
        rw.analysis.first_step_alignment(model, [], "sgd", mean_square)

    class Other(LoraLayer):
        pass

    Adapted.of(model).slots["2"].adapters["default"].__class__ = Other
    with pytest.raises(AttachError, match=r"2: .*found a Other"):
        rw.analysis.first_step_alignment(model, x, "sgd", mean_square)
