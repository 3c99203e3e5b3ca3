"""What holds for every optimizer of the table, on a model with anchored and plain pairs, and for newcomers."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
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
    rw.attach(model.to(dtype), spec)
    model[5].requires_grad_(True)
    return model


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
    changes = [float(pair.layer.delta().norm()) for pair in rw.pairs(model)]
    optimizer = build(name, model, lr=0.05, weight_decay=0.4)  # fresh: no momentum moves it
    before, rates = trained(model), {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for _ in range(3):
        zero_gradients(model)
        optimizer.step()
    for old, parameter in zip(before, rw.trainable_parameters(model), strict=True):
        expected = old * (1 - rates[id(parameter)] * 0.4) ** 3
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)
    assert all(float(pair.layer.delta().norm()) < old for pair, old in zip(rw.pairs(model), changes, strict=True))


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_leaves_all_where_it_is(name: str, init: str) -> None:
    model = adapted(init)
    optimizer, before = build(name, model), trained(model)
    zero_gradients(model)
    optimizer.step()
    assert same(before, trained(model))


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_many_steps_too_small_for_bf16_add_up(name: str) -> None:
    """The same gradients for a bf16 and an fp32 pair: without masters every one of these steps is rounded away."""
    rounded, exact = adapted("kaiming", torch.bfloat16), adapted("kaiming")
    for parameter, twin in zip(rw.trainable_parameters(rounded), rw.trainable_parameters(exact), strict=True):
        parameter.data.normal_()
        twin.data.copy_(parameter)
    start, lr = trained(exact), 2e-5
    optimizers = build(name, rounded, lr), build(name, exact, lr)
    without = [p.clone() for p in trained(rounded)]
    moved = 0
    for step in range(500):
        for parameter, twin in zip(rw.trainable_parameters(rounded), rw.trainable_parameters(exact), strict=True):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step % 3)) + 1.0
            parameter.grad = gradient.bfloat16()
            twin.grad = parameter.grad.float()
        old = trained(exact)
        for optimizer in optimizers:
            optimizer.step()
        for i, (new, now) in enumerate(zip(trained(exact), old, strict=True)):
            without[i] += (new - now).bfloat16()
    for parameter, twin in zip(rw.trainable_parameters(rounded), rw.trainable_parameters(exact), strict=True):
        torch.testing.assert_close(parameter.detach(), twin.detach().bfloat16(), rtol=1e-2, atol=1e-4)
    moved = [float((new - old).norm()) for new, old in zip(trained(exact), start, strict=True)]
    lost = [float((kept.float() - new).norm()) for kept, new in zip(without, trained(exact), strict=True)]
    kept = [float((p.float() - new).norm()) for p, new in zip(trained(rounded), trained(exact), strict=True)]
    assert sum(kept) < 0.2 * sum(moved) < sum(lost)
