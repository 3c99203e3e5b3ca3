"""What a change does to a weight, against slow literal transcriptions on dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.algebra.low_rank import LowRank
from rankwise.analysis import (
    effective_rank,
    energy_captured,
    grassmann_distance,
    intruder_dimensions,
    merge_loss,
    relative_size,
    stable_rank,
    subspace_similarity,
)
from rankwise.errors import SpecError
from rankwise.grids import GRIDS, NF4_LEVELS

shapes = st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6))


def drawn(out: int, into: int, rank: int, seed: int, size: float = 1.0) -> tuple[LowRank, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)
    return LowRank(B, A, size), torch.randn(out, into, generator=generator)


@given(shapes)
def test_relative_size_is_that_of_the_dense_matrices(case):
    delta, weight = drawn(*case)
    expected = torch.linalg.matrix_norm(delta.dense()) / torch.linalg.matrix_norm(weight)
    assert relative_size(delta, weight) == pytest.approx(float(expected), rel=1e-4)


@given(shapes)
def test_ranks_of_a_spectrum_are_their_definitions(case):
    delta, _ = drawn(*case)
    s = torch.linalg.svdvals(delta.dense().double())
    p = [float(x / s.sum()) for x in s if x > 0]
    entropy = -sum(x * torch.tensor(x).log().item() for x in p)
    assert effective_rank(s) == pytest.approx(float(torch.tensor(entropy).exp()), rel=1e-4)
    assert stable_rank(s) == pytest.approx(float((s**2).sum() / s.max() ** 2), rel=1e-9)
    shares = energy_captured(s)
    for j in range(len(s)):
        kept = (torch.linalg.svd(delta.dense().double())[0][:, : j + 1].T @ delta.dense().double()).square().sum()
        assert float(shares[j]) == pytest.approx(float(kept / delta.dense().double().square().sum()), rel=1e-6)


def test_the_rank_of_nothing_is_none():
    assert effective_rank(torch.zeros(3)) == 0
    assert stable_rank(torch.zeros(3)) == 0
    with pytest.raises(SpecError, match="≥ 0"):
        effective_rank(torch.tensor([1.0, -1.0]))


@settings(deadline=None)
@given(shapes, st.sampled_from([1e-4, 1e-2, 1.0]))
def test_what_a_merge_to_bf16_loses(case, size):
    delta, weight = drawn(*case, size=size)
    dense = delta.dense()
    lost = ((weight + dense).bfloat16().float() - weight.bfloat16().float()) - dense
    expected = torch.linalg.matrix_norm(lost) / torch.linalg.matrix_norm(dense)
    assert merge_loss(delta, weight, "bfloat16") == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def nf4(matrix: torch.Tensor) -> torch.Tensor:
    """Number by number: the nearest level in a block of 64."""
    flat, levels = matrix.flatten(), torch.tensor(NF4_LEVELS)
    out = torch.empty_like(flat)
    for first in range(0, len(flat), 64):
        block = flat[first : first + 64]
        largest = block.abs().max()
        for i, x in enumerate(block):
            out[first + i] = levels[(levels - x / largest).abs().argmin()] * largest
    return out.view_as(matrix)


@settings(deadline=None, max_examples=15)
@given(shapes, st.sampled_from([1e-2, 1.0]))
def test_what_a_merge_to_nf4_loses(case, size):
    delta, weight = drawn(*case, size=size)
    dense = delta.dense()
    lost = (nf4(weight + dense) - nf4(weight)) - dense
    expected = torch.linalg.matrix_norm(lost) / torch.linalg.matrix_norm(dense)
    assert merge_loss(delta, weight, "nf4") == pytest.approx(float(expected), rel=1e-2)


@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 100.0]))
def test_nf4_takes_the_nearest_level(seed, size):
    matrix = torch.randn(7, 64, generator=torch.Generator().manual_seed(seed)) * size
    assert torch.allclose(GRIDS["nf4"].read(matrix), nf4(matrix), rtol=1e-6)


def test_nf4_is_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    assert torch.allclose(nf4(weight), theirs, atol=1e-6)


def test_pieces_of_a_large_weight_add_up(monkeypatch):
    delta, weight = drawn(70, 48, 3, 0, size=1e-2)
    whole = {storage: merge_loss(delta, weight, storage) for storage in ("bfloat16", "nf4")}
    monkeypatch.setattr("rankwise.analysis.change._ROWS_OF", 100)
    for storage, expected in whole.items():
        assert merge_loss(delta, weight, storage) == pytest.approx(expected, rel=1e-5)


def intruders(delta: LowRank, weight: torch.Tensor, k: int, epsilon: float) -> int:
    """Shuttleworth 2024, algorithm 1, as printed."""
    old = torch.linalg.svd(weight.double(), full_matrices=False)[0]
    new = torch.linalg.svd((weight + delta.dense()).double(), full_matrices=False)[0]
    return sum(max(abs(float(new[:, j] @ old[:, i])) for i in range(old.shape[1])) < epsilon for j in range(k))


@settings(deadline=None, max_examples=30)
@given(shapes, st.sampled_from([0.1, 1.0, 10.0]))
def test_intruder_dimensions_are_the_algorithm_as_printed(case, size):
    delta, weight = drawn(*case, size=size)
    k = min(weight.shape) // 2 or 1
    # At a cosine on the border the two may differ by rounding: the border moves a little, the count not beyond it.
    low, high = (intruders(delta, weight, k, epsilon) for epsilon in (0.499, 0.501))
    assert low <= intruder_dimensions(delta, weight, k, 0.5) <= high


def test_a_planted_intruder_is_found_and_a_scaled_weight_has_none():
    generator = torch.Generator().manual_seed(0)
    weight = torch.diag(torch.arange(30, 0, -1.0))
    even = torch.ones(30, 1) / 30**0.5  # as far from every axis as can be
    assert intruder_dimensions(LowRank(even, even.T, 200.0), weight, 5, 0.5) >= 1
    u, _, v = torch.linalg.svd(torch.randn(30, 20, generator=generator), full_matrices=False)
    spread = u @ torch.diag(torch.arange(20, 0, -1.0)) @ v
    assert intruder_dimensions(LowRank(u[:, :3], v[:3], 5.0), spread, 10) == 0


@given(shapes, st.integers(1, 6))
def test_grassmann_distance_from_principal_angles(case, other):
    _, into, rank, seed = case
    rank, other = min(rank, into), min(other, into)
    generator = torch.Generator().manual_seed(seed)
    A1, A2 = torch.randn(rank, into, generator=generator), torch.randn(other, into, generator=generator)
    found, similar = grassmann_distance(A1, A2), subspace_similarity(A1, A2)
    v1, v2 = (torch.linalg.svd(A.double(), full_matrices=False)[2] for A in (A1, A2))
    for i in range(1, rank + 1):
        for j in range(1, other + 1):
            cosines = torch.linalg.svdvals(v1[:i] @ v2[:j].T)
            p = min(i, j)
            squared = p - float(cosines.square().sum())
            assert float(found[i - 1, j - 1]) ** 2 == pytest.approx(squared, abs=1e-4)
            assert float(similar[i - 1, j - 1]) == pytest.approx(1 - squared / p, abs=1e-4)


def test_shapes_that_do_not_fit_are_named():
    delta, _ = drawn(4, 5, 2, 0)
    for call in (relative_size, merge_loss, intruder_dimensions):
        with pytest.raises(SpecError, match=r"\(4, 5\)"):
            call(delta, torch.ones(5, 4))
    with pytest.raises(SpecError, match="bfloat16"):
        merge_loss(delta, torch.ones(4, 5), "bfloat61")
