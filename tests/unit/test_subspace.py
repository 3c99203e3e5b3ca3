"""Section 7 of the LoRA paper: each number against a slow, dense, literal transcription."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankwise import LowRank
from rankwise.analysis import amplification, subspace_similarity
from rankwise.errors import SpecError


def literal_similarity(A1: Tensor, A2: Tensor) -> Tensor:
    U1, U2 = (torch.linalg.svd(A)[2].T for A in (A1, A2))
    phi = torch.empty(A1.shape[0], A2.shape[0], dtype=A1.dtype)
    for i in range(1, A1.shape[0] + 1):
        for j in range(1, A2.shape[0] + 1):
            phi[i - 1, j - 1] = torch.linalg.matrix_norm(U1[:, :i].T @ U2[:, :j]) ** 2 / min(i, j)
    return phi


@given(r1=st.integers(1, 5), r2=st.integers(1, 5), extra=st.integers(0, 6), seed=st.integers(0, 9999))
def test_similarity_is_the_literal_one(r1: int, r2: int, extra: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    A1, A2 = (torch.randn(r, max(r1, r2) + extra, generator=rng, dtype=torch.float64) for r in (r1, r2))
    phi = subspace_similarity(A1, A2)
    torch.testing.assert_close(phi, literal_similarity(A1, A2))
    assert phi.min() >= 0 and phi.max() <= 1 + 1e-9
    torch.testing.assert_close(phi, subspace_similarity(A2, A1).T)


def test_similarity_is_one_minus_the_grassmann_distance_over_p() -> None:
    A1, A2 = torch.randn(3, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    q1, q2 = torch.linalg.qr(A1.T).Q, torch.linalg.qr(A2.T).Q
    cosines = torch.linalg.svdvals(q1.T @ q2)
    distance = 3 - cosines.square().sum()
    assert float(subspace_similarity(A1, A2)[2, 4]) == pytest.approx(float(1 - distance / 3))


def test_similarity_of_the_same_and_of_orthogonal_subspaces() -> None:
    A = torch.randn(4, 10)
    mixed = torch.randn(4, 4) @ A  # the same rows' span
    assert float(subspace_similarity(A, mixed)[3, 3]) == pytest.approx(1.0, abs=1e-5)
    axes = torch.eye(10)
    torch.testing.assert_close(subspace_similarity(axes[:3], axes[3:7]), torch.zeros(3, 4))


def test_similarity_takes_half_precision_and_parameters() -> None:
    A = torch.nn.Parameter(torch.randn(3, 8, dtype=torch.bfloat16))
    phi = subspace_similarity(A, A)
    assert phi.dtype == torch.float32 and not phi.requires_grad
    torch.testing.assert_close(phi.diagonal(), torch.ones(3))


@given(r=st.integers(1, 4), seed=st.integers(0, 9999), scale=st.sampled_from([1.0, 2.0, -0.5]))
def test_amplification_is_the_literal_one(r: int, seed: int, scale: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    out, into = 9, 7
    B, A, W = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((out, r), (r, into), (out, into)))
    delta = scale * B @ A
    for k in range(1, r + 1):
        got = amplification(LowRank(B, A, scale), W, rank=k)
        U, _, Vh = torch.linalg.svd(delta)
        assert got.change == pytest.approx(float(delta.norm()))
        assert got.along_change == pytest.approx(float((U[:, :k].T @ W @ Vh[:k].T).norm()))
        own_U, _, own_Vh = torch.linalg.svd(W)
        assert got.along_weight == pytest.approx(float((own_U[:, :k].T @ W @ own_Vh[:k].T).norm()))
        assert got.factor == pytest.approx(got.change / got.along_change)
        assert 0 < got.along_random < got.along_weight + 1e-9
    assert amplification(LowRank(B, A, scale), W) == got, "by default all directions"


def test_amplification_counts_only_directions_that_are_there() -> None:
    """[B, B] [A; A] has the factors of a rank 6 and the rank of 3; the other 3 directions are arbitrary."""
    B, A, W = torch.randn(20, 3), torch.randn(3, 15), torch.randn(20, 15)
    single, double = LowRank(B, A), LowRank(torch.cat([B, B], 1), torch.cat([A, A]), 0.5)
    got = amplification(double, W)
    assert got.rank == 3
    assert got.factor == pytest.approx(amplification(single, W).factor, rel=1e-4)


def test_amplification_of_a_large_weight_finds_its_top_directions() -> None:
    delta = LowRank(torch.randn(400, 2), torch.randn(2, 300))
    W = torch.randn(400, 300)
    top = torch.linalg.svdvals(W)[:2].norm()
    assert amplification(delta, W).along_weight == pytest.approx(float(top), rel=2e-2)


def test_refusals() -> None:
    with pytest.raises(SpecError, match="same in"):
        subspace_similarity(torch.randn(2, 5), torch.randn(2, 6))
    with pytest.raises(SpecError, match="delta's shape"):
        amplification(LowRank(torch.ones(3, 1), torch.ones(1, 4)), torch.ones(4, 3))
    with pytest.raises(SpecError, match="which is 0"):
        amplification(LowRank(torch.zeros(3, 1), torch.ones(1, 4)), torch.ones(3, 4))
    with pytest.raises(SpecError, match="which is 1, found 2"):
        amplification(LowRank(torch.ones(3, 1), torch.ones(1, 4)), torch.ones(3, 4), rank=2)
