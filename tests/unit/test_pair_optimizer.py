"""What PairOptimizer does between a direction and the parameters: stacks, state, options, masters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import SpecError
from rankwise.optim import LoraPro, PairOptimizer, pair_optimizer
from rankwise.pair import Pair


class Recorder(PairOptimizer):
    """Its direction is the gradient times the number of the step; it writes down what it was called with."""

    def __init__(self, pairs: list[Pair], lr: float = 1.0, weight_decay: float = 0.0, others: Any = ()) -> None:
        self.calls: list[tuple[torch.Size, int, Any]] = []
        options = {"factor": 1.0}
        super().__init__(pairs, self.record, options, lr=lr, weight_decay=weight_decay, others=others)

    def record(
        self, A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scale: float, state: dict[str, Any], factor: Any
    ) -> tuple[Tensor, Tensor]:
        state["step"] = state.get("step", 0) + 1
        state["sum"] = state.get("sum", torch.zeros_like(grad_A)) + grad_A
        self.calls.append((A.shape, state["step"], factor))
        return factor * state["step"] * grad_A, factor * state["step"] * grad_B


def adapted(layers: int = 3, size: int = 4, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)), nn.Linear(size, 2))
    return rw.attach(model, rw.LoRA(rank=2, **options))


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in rw.trainable_parameters(model):
        parameter.grad = torch.randn(parameter.shape, generator=rng).to(parameter.dtype)


def test_pairs_of_equal_shape_and_scale_are_stepped_together() -> None:
    model = adapted(alpha_pattern={"1": 8})
    optimizer = Recorder(rw.pairs(model))
    give_gradients(model)
    optimizer.step()
    assert [tuple(shape) for shape, _, _ in optimizer.calls] == [(2, 2, 4), (1, 2, 4), (1, 2, 4)]


def test_a_pair_that_has_taken_fewer_steps_has_its_own_count() -> None:
    """As an expert that no token chose at first."""
    model = adapted()
    optimizer, last = Recorder(rw.pairs(model)[:3]), rw.pairs(model)[2]
    give_gradients(model)
    for parameter in last.parameters:
        parameter.grad = None
    optimizer.step()
    give_gradients(model, seed=1)
    before = last.parameters[1].detach().clone()
    optimizer.step()
    assert [(shape[0], step) for shape, step, _ in optimizer.calls] == [(2, 1), (2, 2), (1, 1)]
    torch.testing.assert_close(last.parameters[1].detach(), before - last.parameters[1].grad)
    assert torch.equal(optimizer.state[last.parameters[0]]["sum"], last.parameters[0].grad)


@pytest.mark.parametrize("form", ["sgd", "adamw"])
def test_together_or_one_by_one_is_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [adapted(init="pissa").double() for _ in range(2)]
    for model, entries in zip(models, (2**18, 1), strict=True):
        monkeypatch.setitem(pair_optimizer._STACKED_ENTRIES, "cpu", entries)
        optimizer = LoraPro(rw.pairs(model), lr=1e-2, form=form)
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
    for one, other in zip(*map(rw.trainable_parameters, models), strict=True):
        torch.testing.assert_close(one, other)


def test_an_option_in_the_parameter_group_may_change_between_steps() -> None:
    model = adapted()
    optimizer = Recorder(rw.pairs(model))
    for factor in (1.0, 0.5):
        optimizer.param_groups[0]["factor"] = factor
        give_gradients(model)
        optimizer.step()
    assert [factor for _, _, factor in optimizer.calls] == [1.0, 1.0, 0.5, 0.5]


def test_what_is_in_no_pair_may_have_a_rate_of_its_own() -> None:
    model = adapted()
    model.head = nn.Linear(3, 3)
    optimizer = LoraPro.for_model(model, lr=1e-3, others_lr=0.5)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("pairs", 1e-3), ("others", 0.5)]
    with pytest.raises(SpecError, match="others_lr: expected a positive number"):
        LoraPro.for_model(model, lr=1e-3, others_lr=0.0)


def test_a_parameter_changed_by_someone_else_is_taken_as_it_is() -> None:
    """The master follows: a restart or a pruned row is not undone by it."""
    model = adapted().to(torch.bfloat16)
    optimizer = Recorder(rw.pairs(model), lr=1e-4)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    A = rw.pairs(model)[0].parameters[0]
    kept = optimizer.state[A]["master"].clone()
    with torch.no_grad():
        A[0] = 7.0
    for parameter in rw.trainable_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    master = optimizer.state[A]["master"]
    assert torch.equal(master[0], torch.full_like(master[0], 7.0))
    assert torch.equal(master[1], kept[1])


def test_fp16_gradients_whose_norm_overflows_are_finite() -> None:
    model = adapted().to(torch.float16)
    optimizer = Recorder(rw.pairs(model), lr=1e-6)
    for parameter in rw.trainable_parameters(model):
        parameter.grad = torch.full_like(parameter, 5e4)
    optimizer.step()
    assert len(optimizer.calls) == 2
