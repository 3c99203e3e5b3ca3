"""LoRA+ parameter groups: every trainable parameter once, B at its own rate, nothing dropped on the way."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import AttachError, SpecError
from rankwise.optim import derived_ratio


class Net(nn.Module):
    """One layer of each kind that is adapted here, of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.wide = nn.Linear(8, 32)
        self.narrow = nn.Linear(32, 8)
        self.square = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(self.square(self.narrow(self.wide(h).relu())).mean(1))


ALL = ("table", "wide", "narrow", "square")


def adapted(targets: tuple[str, ...] = ALL, **options: Any) -> nn.Module:
    return rw.attach(Net(), rw.LoRA(rank=2, target_modules=targets, **options))


def rate_of(groups: list[dict[str, Any]], parameter: nn.Parameter) -> float:
    return next(group["lr"] for group in groups if any(parameter is member for member in group["params"]))


@pytest.mark.parametrize(
    ("out", "into", "ratio"), [(4096, 4096, 22.6), (768, 768, 9.8), (11008, 4096, 8.4), (4096, 11008, 99.7)]
)
def test_derived_ratio_gives_the_published_numbers(out: int, into: int, ratio: float) -> None:
    assert derived_ratio(out, into, 8) == pytest.approx(ratio, abs=0.05)


def test_derived_ratio_balances_the_two_contributions() -> None:
    """lr(A)·‖g_A‖₁ = lr(B)·‖g_B‖₁ under the derivation's assumption on the entries' sizes, written out."""
    out, into, rank = 48, 96, 4
    size_A, size_B = math.sqrt(1 / into), math.sqrt(1 / rank)
    by_A, by_B = into * rank * size_B, out * rank * size_A
    assert by_A == pytest.approx(derived_ratio(out, into, rank) * by_B)


@given(
    targets=st.sets(st.sampled_from(ALL), min_size=1),
    whole_head=st.booleans(),
    freeze_A=st.booleans(),
    lr_ratio=st.sampled_from([1, 0.5, 16, 16.0, "derived"]),
)
def test_every_trainable_parameter_appears_once(
    targets: set[str], whole_head: bool, freeze_A: bool, lr_ratio: float | str
) -> None:
    model = adapted(tuple(targets))
    model.head.requires_grad_(whole_head)
    if freeze_A:
        for pair in rw.pairs(model):
            pair.parameters[0].requires_grad_(False)
    groups = rw.param_groups(model, lr=1e-3, lr_ratio=lr_ratio, weight_decay=0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(listed) == len(set(listed))
    assert all(group["params"] and group["weight_decay"] == 0.1 for group in groups)
    rates = [group["lr"] for group in groups]
    assert len(rates) == len(set(rates)), "groups of equal rate are one"
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("init", ["kaiming", "init-b", "pissa"])
def test_b_is_faster_whichever_half_starts_at_zero(init: str) -> None:
    model = adapted(("wide", "narrow"), init=init)
    groups = rw.param_groups(model, lr=1e-4, lr_ratio=16)
    assert [group["name"] for group in groups] == ["all but B", "B × 16"]
    for pair in rw.pairs(model):
        assert rate_of(groups, pair.parameters[0]) == 1e-4
        assert rate_of(groups, pair.parameters[1]) == pytest.approx(16e-4)


def test_derived_rates_follow_each_layers_shape() -> None:
    model = adapted(("wide", "narrow", "square"))
    groups = rw.param_groups(model, lr=1.0, lr_ratio="derived")
    rates = {pair.name: rate_of(groups, pair.parameters[1]) for pair in rw.pairs(model)}
    assert rates == pytest.approx({"wide": 8 / 32 * 2, "narrow": 32 / 8 * 4, "square": 2.0})


@pytest.mark.parametrize("lr_ratio", [16, "derived"])
def test_embeddings_heads_and_other_adapter_tensors_stay_at_lr(lr_ratio: float | str) -> None:
    model = adapted()
    model.head.requires_grad_(True)
    layer = Adapted.of(model).slots["square"].adapters["default"]
    layer.magnitude = nn.Parameter(torch.ones(8))
    groups = rw.param_groups(model, lr=1e-3, lr_ratio=lr_ratio)
    table = next(pair for pair in rw.pairs(model) if pair.name == "table")
    for parameter in (*table.parameters, layer.magnitude, model.head.weight, model.head.bias):
        assert rate_of(groups, parameter) == 1e-3


def test_only_the_active_adapter_is_listed() -> None:
    model = adapted(("wide",))
    rw.attach(model, rw.LoRA(rank=2, target_modules=("square",)), name="other")
    listed = {id(p) for group in rw.param_groups(model) for p in group["params"]}
    assert listed == {id(p) for pair in rw.pairs(model, "other") for p in pair.parameters}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_and_schedulers_keep_the_ratio(optimizer: type[torch.optim.Optimizer]) -> None:
    from transformers import get_cosine_schedule_with_warmup

    model = adapted(("wide",))
    steps = optimizer(rw.param_groups(model, lr=1e-2, lr_ratio=4))
    schedule = get_cosine_schedule_with_warmup(steps, 1, 6)
    for _ in range(4):
        model(torch.arange(6).view(2, 3)).square().sum().backward()
        steps.step()
        schedule.step()
        slow, fast = (group["lr"] for group in steps.param_groups)
        assert 0 < slow < 1.1e-2
        assert fast == pytest.approx(4 * slow)


def test_sgd_moves_b_by_its_own_rate() -> None:
    model = adapted(("wide",), init="pissa")
    (pair,) = rw.pairs(model)
    before = [p.detach().clone() for p in pair.parameters]
    model(torch.arange(6).view(2, 3)).square().sum().backward()
    torch.optim.SGD(rw.param_groups(model, lr=1e-2, lr_ratio=8)).step()
    for parameter, old, rate in zip(pair.parameters, before, (1e-2, 8e-2), strict=True):
        assert parameter.grad is not None and parameter.grad.any()
        torch.testing.assert_close(parameter, old - rate * parameter.grad)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": -1e-4},
        {"lr": math.nan},
        {"lr": True},
        {"lr_ratio": 0},
        {"lr_ratio": -16.0},
        {"lr_ratio": math.inf},
        {"lr_ratio": "dervied"},
        {"weight_decay": -0.1},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(options))):
        rw.param_groups(adapted(("wide",)), **options)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(AttachError, match="carries no adapter"):
        rw.param_groups(Net())


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = adapted(("wide",))
    model.requires_grad_(False)
    with pytest.raises(AttachError, match="trainable"):
        rw.param_groups(model)
