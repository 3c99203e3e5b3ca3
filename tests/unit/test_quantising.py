"""Merging for storage in few bits: its readers' own codes, GPTQ as printed, and what is refused."""

from collections.abc import Callable
from copy import deepcopy

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
from zoo import left_as_it_was, perturb

import rankwise as rw
from rankwise.errors import EvidenceError, MergeError, SpecError
from rankwise.grids import GRIDS, Grid
from rankwise.quantising import _DAMPING, rounded


def bitsandbytes_4bit(kind: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def read(weight: Tensor) -> tuple[Tensor, Tensor]:
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        return packed, bnb.functional.dequantize_4bit(packed, state).float()

    return read


def bitsandbytes_8bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    return codes, bnb.functional.int8_vectorwise_dequant(codes, scales)


def torchao_4bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    model = nn.Sequential(layer)
    quantize_(
        model,
        IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR),
    )
    return model[0].weight.qdata, model[0].weight.dequantize().float()


READERS = {"nf4": bitsandbytes_4bit("nf4"), "fp4": bitsandbytes_4bit("fp4"), "int8": bitsandbytes_8bit}
READERS |= {"int4": torchao_4bit}
BIT_FOR_BIT = ("nf4", "fp4")  # the others' scales are quotients, which readers round in their own ways


def inputs_and_weight(seed: int, out: int = 24, into: int = 64, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(into, into, generator=generator) * torch.logspace(0, -2, into)[:, None]
    x = torch.randn(300, into, generator=generator) @ mixing
    return x, torch.randn(out, into, generator=generator).to(dtype)


def test_every_storage_has_a_reader():
    assert READERS.keys() == GRIDS.keys()


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6))
def test_a_reader_has_what_the_grid_says(kind: str, dtype: torch.dtype, seed: int):
    _, weight = inputs_and_weight(seed, dtype=dtype)
    _, theirs = READERS[kind](weight)
    ours = GRIDS[kind].read(weight)
    # A number that lies between two levels falls to either; in bf16 a reader's scale or product is rounded too.
    apart = (ours - theirs).abs() / theirs.abs().clamp_min(1e-3)
    assert float((apart > (1e-5 if dtype == torch.float32 else 0.01)).float().mean()) < (
        0.005 if kind != "int4" or dtype == torch.float32 else 0.1
    )


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighed", [False, True])
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6))
def test_what_is_stored_is_read_as_it_is(kind: str, dtype: torch.dtype, weighed: bool, seed: int):
    x, weight = inputs_and_weight(seed)
    grid, C = GRIDS[kind], x.T @ x / len(x)
    stored = grid.read(rounded(weight, grid, C if weighed else None).to(dtype)).to(dtype)
    codes, values = READERS[kind](stored)
    again, _ = READERS[kind](values.to(dtype))
    assert torch.equal(codes, again)
    if kind in BIT_FOR_BIT:
        assert torch.equal(values.to(dtype), stored)
    else:  # a unit in the last place of the scale
        torch.testing.assert_close(values.to(dtype), stored, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", GRIDS)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 300.0]))
@settings(deadline=None, max_examples=10)
def test_rounding_loses_no_more_than_a_reader_does(kind: str, seed: int, size: float):
    _, weight = inputs_and_weight(seed)
    weight, grid = weight * size, GRIDS[kind]
    assert float((rounded(weight, grid) - weight).norm()) <= float((grid.read(weight) - weight).norm()) * (1 + 1e-3)


def as_printed(weight: Tensor, C: Tensor, grid: Grid) -> Tensor:
    """Frantar 2022, eq. 2 and 3, literally: of the numbers left, the inverse is taken anew after every column."""
    W, groups = weight.double().clone(), grid.grouped(weight)
    scales = grid.clipped_scales(groups, grid.grouped(C.diagonal().expand_as(weight)))
    per_number = scales.expand_as(groups).reshape(weight.shape).double()
    outermost = torch.maximum(groups / grid.levels[-1], groups / grid.levels[0]).argmax(1)
    H = C.double() + _DAMPING * C.double().diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
    levels, rest, kept = torch.tensor(grid.levels, dtype=torch.float64), [], torch.zeros_like(W)
    rest = C.diagonal().argsort(descending=True).tolist()
    width = grid.group or weight.shape[1]
    while rest:
        j, inverse = rest[0], torch.linalg.inv(H[rest][:, rest])
        for i in range(len(W)):
            scale = per_number[i, j]
            level = levels[(levels - W[i, j] / scale).abs().argmin()]
            if outermost[(i * weight.shape[1] + j) // width] == (i * weight.shape[1] + j) % width:
                level = levels[0] if weight[i, j] < 0 else levels[-1]
            kept[i, j] = level * scale
        error = (W[:, j] - kept[:, j]) / inverse[0, 0]
        W[:, rest] -= error[:, None] * inverse[0]
        rest = rest[1:]
    return kept


@pytest.mark.parametrize("kind", GRIDS)
def test_columns_make_up_for_each_other_as_printed(kind: str):
    x, weight = inputs_and_weight(3, out=6)
    grid, C = GRIDS[kind], x.T @ x / len(x)
    kept, expected = rounded(weight, grid, C), as_printed(weight, C, grid)

    def lost(each: Tensor) -> float:
        return float(((each - weight).double() @ x.double().T).norm())

    assert lost(kept) == pytest.approx(lost(expected), rel=0.02)  # where two levels are as near, one or the other
    assert float((kept - expected).abs().gt(1e-4).float().mean()) < 0.02
    assert lost(kept) < 0.75 * lost(rounded(weight, grid))


# ------------------------------------------------------------------------------------------------------------- a model


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(9, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embed(ids))))


IDS = torch.randint(9, (4, 3, 40), generator=torch.Generator().manual_seed(0))


def adapted(variant: str = "lora", dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = rw.attach(
        Small().to(dtype),
        rw.LoRA(rank=4, target_modules=["first", "embed"][: 1 if variant == "dora" else 2], variant=variant, **options),
    )
    perturb(model, 0.05)
    return model


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighed", [False, True])
def test_a_model_is_folded_and_rounded(kind: str, variant: str, dtype: torch.dtype, weighed: bool):
    model = adapted(variant, dtype)
    exact = deepcopy(model).float()
    rw.merge(exact)
    with torch.no_grad():
        inputs = {"first": exact.embed(IDS).reshape(-1, 64)}
        inputs["second"] = torch.tanh(exact.first(inputs["first"]))
    before = Small.__call__(deepcopy(exact), IDS[0]).detach()
    report = rw.merge_quantised(model, kind, batches=IDS if weighed else None, forward=lambda model, ids: model(ids))
    assert set(report.sites) == {"first", "second"}
    assert set(report.others.sites) == ({"embed"} if variant == "lora" else set())
    assert not [name for name in model.state_dict() if "lora" in name or "rankwise" in name]
    for name, site in report.sites.items():
        wanted, stored = exact.get_submodule(name).weight.detach(), model.get_submodule(name).weight.detach()
        assert stored.dtype == dtype
        read = GRIDS[kind].read(stored)
        torch.testing.assert_close(read.to(dtype), stored, rtol=2 * torch.finfo(dtype).eps, atol=0)
        error = read - wanted
        assert site.error == pytest.approx(
            float(error.norm() / wanted.norm()), rel=1e-3 if dtype == torch.float32 else 0.02
        )
        if weighed:
            expected = (inputs[name] @ error.T).norm() / (inputs[name] @ wanted.T).norm()
            assert site.output_error == pytest.approx(float(expected), rel=1e-2 if dtype == torch.float32 else 0.3)
        else:
            assert site.output_error is None
    assert report.sites["first"].change > 0 == report.sites["second"].change
    after = model(IDS[0]).detach().float()
    assert float((after - before).norm() / before.norm()) < (0.02 if kind == "int8" else 0.25)
    assert "first" in str(report) and "second" in str(report)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_batches_keep_outputs(kind: str):
    """On other inputs of the same kind than those that were given."""

    def moved(**options: object) -> float:
        model = adapted()
        before = model(IDS[3]).detach()
        rw.merge_quantised(model, kind, **options)
        return float((model(IDS[3]).detach() - before).norm())

    assert moved(batches=IDS[:3], forward=lambda model, ids: model(ids)) < 0.8 * moved()


def test_one_rounding_is_nearer_than_two():
    wanted = deepcopy(adapted())
    rw.merge(wanted)
    once = adapted()
    rw.merge_quantised(once, "nf4")
    twice = adapted()
    with torch.no_grad():
        twice.first.weight.copy_(GRIDS["nf4"].read(twice.first.weight))
    rw.merge_quantised(twice, "nf4")
    lost = [float((model.first.weight - wanted.first.weight).detach().norm()) for model in (once, twice)]
    assert lost[0] < 0.85 * lost[1]


def test_an_anchor_that_is_folded_into_the_base():
    model, plain = (adapted(init="pissa", anchor=anchor) for anchor in ("fold", "frozen"))
    reports = [rw.merge_quantised(each, "int8") for each in (model, plain)]
    assert reports[0].sites["first"].change == pytest.approx(reports[1].sites["first"].change, rel=1e-3)
    torch.testing.assert_close(model.first.weight, plain.first.weight, atol=1e-2, rtol=0)


@pytest.mark.parametrize("size", [1, 10**9])
def test_covariances_are_held_some_at_a_time(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rankwise.quantising._HELD", size)
    model = adapted()
    rw.merge_quantised(model, "nf4", batches=(ids for ids in IDS), forward=lambda model, ids: model(ids))
    monkeypatch.undo()
    other = adapted()
    rw.merge_quantised(other, "nf4", batches=IDS, forward=lambda model, ids: model(ids))
    assert torch.equal(model.first.weight, other.first.weight)
    assert torch.equal(model.second.weight, other.second.weight)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(50, 8)


def test_what_is_refused():
    model = adapted()
    with left_as_it_was(model), pytest.raises(SpecError, match="storage"):
        rw.merge_quantised(model, "nf5")
    with left_as_it_was(model), pytest.raises(EvidenceError):
        rw.merge_quantised(model, "nf4", batches=[])
    odd = rw.attach(Odd(), rw.LoRA(rank=2))
    for kind, group in (("int4", 32), ("nf4", 64), ("fp4", 64)):
        with left_as_it_was(odd), pytest.raises(MergeError, match=rf"^odd: its rows of 50 .* groups of {group}.*int8"):
            rw.merge_quantised(odd, kind)
    assert set(rw.merge_quantised(odd, "int8").sites) == {"odd"}
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with left_as_it_was(model), pytest.raises(MergeError, match=r"^second: .* NaN or infinity"):
        rw.merge_quantised(model, "nf4")
    tied = adapted()
    tied.second.weight = nn.Parameter(torch.randn(64, 64))
    tied.first.weight = tied.second.weight
    with left_as_it_was(tied), pytest.raises(MergeError, match=r"^first: its weight is shared"):
        rw.merge_quantised(tied, "nf4")
