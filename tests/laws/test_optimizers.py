"""What holds for every optimizer of the table, on a model with anchored and plain pairs, and for newcomers."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import CheckpointError, SpecError, TrainingError
from rankwise.methods import resolve
from rankwise.optim import OPTIMIZERS, PairOptimizer
from rankwise.optim.choice import OptimizerChoice, PairChoice

NAMES = list(OPTIMIZERS)
PAIR_NAMES = [name for name, row in OPTIMIZERS.items() if issubclass(row.cls, PairChoice)]
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(5))


def optimizer_class(name: str) -> type[PairOptimizer]:
    choice = resolve(OPTIMIZERS, name, "optimizer")
    assert isinstance(choice, PairChoice)
    return choice.optimizer


def build(name: str, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    choice = resolve(OPTIMIZERS, name, "optimizer")
    assert isinstance(choice, OptimizerChoice)
    return choice(model, lr, weight_decay)


def adapted(init: str = "pissa", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Three layers with pairs, two of them of equal shape, and a head that is trained whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    spec = rw.LoRA(rank=2, alpha=5, init=init, target_modules=("0", "2", "4"), **options)
    rw.attach(model, spec)
    model[5].requires_grad_(True)
    return model.to(dtype)


def loss_of(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(X.to(dtype)).float() - 1.0).square().mean()


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: Callable[[], Any] = lambda: None
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        after()


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in rw.trainable_parameters(model)]


def change(pair: rw.Pair) -> Tensor:
    return pair.layer.delta().dense().detach()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def zero_gradients(model: nn.Module) -> None:
    for parameter in rw.trainable_parameters(model):
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_resumes_bit_for_bit(name: str, init: str, dtype: torch.dtype) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = adapted(init, dtype)
        optimizer = build(name, model, weight_decay=0.1)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    model, optimizer, schedule = fresh()
    run(model, optimizer, 3, schedule.step)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    run(model, optimizer, 3, schedule.step)

    resumed, second, again = fresh()
    file.seek(0)
    for part, saved in zip((resumed, second, again), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    run(resumed, second, 3, again.step)
    assert same(trained(model), trained(resumed))
    whole, found = optimizer.state_dict()["state"], second.state_dict()["state"]
    assert {key: list(state) for key, state in whole.items()} == {key: list(state) for key, state in found.items()}
    for key, state in whole.items():
        for entry, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found[key][entry])), (key, entry)


@pytest.mark.parametrize("name", NAMES)
def test_decay_alone_shrinks_what_is_trained_by_one_minus_lr_times_decay(name: str) -> None:
    """With an anchor what is trained is δ, so the change of the weight goes to zero and the model to the pretrained."""
    model = adapted("pissa", torch.float64)
    run(model, build(name, model, lr=1e-2), 3)
    changes = [change(pair).norm() for pair in rw.pairs(model)]
    optimizer = build(name, model, lr=0.05, weight_decay=0.4)  # fresh: no momentum moves it
    before, rates = trained(model), {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for _ in range(3):
        zero_gradients(model)
        optimizer.step()
    for old, parameter in zip(before, rw.trainable_parameters(model), strict=True):
        expected = old * (1 - rates[id(parameter)] * 0.4) ** 3
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)
    assert all(change(pair).norm() < old for pair, old in zip(rw.pairs(model), changes, strict=True))


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_leaves_all_where_it_is(name: str, init: str) -> None:
    model = adapted(init)
    optimizer, before = build(name, model), trained(model)
    zero_gradients(model)
    optimizer.step()
    assert same(before, trained(model))


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("name", PAIR_NAMES)
def test_many_steps_too_small_for_bf16_add_up(name: str, init: str) -> None:
    """With the same gradients a bf16 adapter is the fp32 one, rounded; without masters it stays where it was."""
    rounded = adapted(init, torch.bfloat16)
    for parameter in rw.trainable_parameters(rounded):
        parameter.data.normal_()
    exact, without = copy.deepcopy(rounded).float(), copy.deepcopy(rounded)
    models = rounded, exact, without
    optimizers = [build(name, model, lr=5e-5) for model in models]
    start = trained(exact)
    for step in range(100):
        rng = torch.Generator().manual_seed(step % 3)
        for parameters in zip(*map(rw.trainable_parameters, models), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=rng).bfloat16() + 1.0
            for parameter in parameters:
                parameter.grad = gradient.to(parameter.dtype)
        for optimizer in optimizers:
            optimizer.step()
        for state in optimizers[2].state.values():
            state.pop("master")
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(trained(rounded), trained(exact), strict=True))
    moved, missed = (
        sum(float((b.float() - a.float()).norm()) for a, b in zip(ends, trained(exact), strict=True))
        for ends in (start, trained(without))
    )
    assert missed > 0.5 * moved > 0


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_from_a_zero_half_is_finite_and_bounded(name: str, size: float) -> None:
    """By full fine-tuning's: SGD's lr·‖G‖, or lr for each entry of the weight, whichever is larger."""
    model = adapted("kaiming", torch.float64)
    weights = {pair.name: rw.weights(model)[pair.name].clone().requires_grad_() for pair in rw.pairs(model)}
    optimizer = build(name, model)
    lr = max(group["lr"] for group in optimizer.param_groups)
    output = torch.func.functional_call(model, {f"{name}.weight": w for name, w in weights.items()}, X.double())
    (size * output).square().mean().backward()
    optimizer.step()
    for pair in rw.pairs(model):
        G = weights[pair.name].grad
        bound = 4 * lr * max(float(G.norm()), G.numel() ** 0.5)
        assert 0 < float(change(pair).norm()) < bound


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_what_a_first_step_does_to_the_weight_is_invariant_where_it_is_said_to_be(name: str) -> None:
    """To first order, for (A, B) and (TA, BT⁻¹), which are the same weight."""

    def first_order(T: Tensor) -> list[Tensor]:
        model = adapted("kaiming", torch.float64)
        rng = torch.Generator().manual_seed(7)
        for pair in rw.pairs(model):
            A, B = pair.parameters
            A.data = T @ A.data
            B.data = torch.randn(B.shape, generator=rng, dtype=B.dtype) @ torch.linalg.inv(T)
        before = trained(model)
        old = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in rw.pairs(model)]
        run(model, build(name, model, lr=1e-4), 1)
        assert not same(before, trained(model))
        return [
            B @ (pair.A.detach() - A) + (pair.B.detach() - B) @ A
            for (A, B), pair in zip(old, rw.pairs(model), strict=True)
        ]

    plain = first_order(torch.eye(2, dtype=torch.float64))
    turned = first_order(torch.tensor([[3.0, 1.0], [-0.5, 0.4]], dtype=torch.float64))
    distances = [float((a - b).norm() / a.norm()) for a, b in zip(plain, turned, strict=True)]
    assert (max(distances) < 1e-6) is optimizer_class(name).invariant, distances


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_is_followed(name: str) -> None:
    def moves(factor: float) -> list[Tensor]:
        model = adapted("pissa", torch.float64)
        before, optimizer = trained(model), build(name, model)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor)
        run(model, optimizer, 1)
        return [new - old for new, old in zip(trained(model), before, strict=True)]

    assert not any(move.any() for move in moves(0.0))
    for half, whole in zip(moves(0.5), moves(1.0), strict=True):
        torch.testing.assert_close(2 * half, whole, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("name", PAIR_NAMES)
def test_not_a_number_is_named_and_nothing_moves(name: str, place: int) -> None:
    model = adapted()
    optimizer, before = build(name, model), trained(model)
    loss_of(model).backward()
    rw.trainable_parameters(model)[place].grad.view(-1)[-1] = float("nan")
    names = [pair.name for pair in rw.pairs(model) for _ in pair.parameters] + ["what is in no pair"] * 2
    with pytest.raises(TrainingError, match=f"{names[place]}: its gradient holds NaN or infinity"):
        optimizer.step()
    assert same(before, trained(model))
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_what_would_not_be_stepped_rightly_is_refused_by_name(name: str) -> None:
    cls, model = optimizer_class(name), adapted()
    pairs = rw.pairs(model)
    with pytest.raises(SpecError, match="found none"):
        cls([], lr=1e-3)
    with pytest.raises(SpecError, match=f"{pairs[0].name}: given twice"):
        cls([*pairs, pairs[0]], lr=1e-3)
    with pytest.raises(SpecError, match="lr: expected a positive number"):
        cls(pairs, lr=-1.0)
    with pytest.raises(SpecError, match="weight_decay: expected a number ≥ 0"):
        cls(pairs, lr=1e-3, weight_decay=float("nan"))
    with pytest.raises(SpecError, match="0: its trainable 'magnitude' is in no pair"):
        cls(rw.pairs(adapted(variant="dora")), lr=1e-3)
    with pytest.raises(SpecError, match="expected the variant 'lora' or 'dora', found AdaLoraLayer"):
        cls.for_model(adapted("kaiming", variant="adalora"), lr=1e-3)
    pairs[1].parameters[0].requires_grad_(False)
    with pytest.raises(SpecError, match=f"{pairs[1].name}: expected both halves"):
        cls.for_model(model, lr=1e-3)


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_a_state_of_another_method_or_of_other_pairs_is_refused(name: str) -> None:
    model = adapted()
    optimizer, pairs = build(name, model), rw.pairs(model)
    for other in (other for other in PAIR_NAMES if other != name):
        with pytest.raises(CheckpointError, match="expected the method"):
            build(other, model).load_state_dict(optimizer.state_dict())
    with pytest.raises(CheckpointError, match="expected the pairs"):
        optimizer_class(name)(pairs[:2], lr=1e-3).load_state_dict(optimizer.state_dict())
