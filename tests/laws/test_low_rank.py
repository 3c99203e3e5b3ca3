"""LowRank, the one place where B A is formed: every operation equals the same operation on the dense matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zoo import DTYPES, relative

from rankwise.algebra.low_rank import LowRank, captured, difference
from rankwise.algebra.svd import truncated_svd

sizes = st.integers(1, 9)
scales = st.sampled_from([1.0, -2.0, 0.5, 1e-3, 16 / 8**0.5])
# Rounding of a sum over at most 9 terms, relative to the result of a well-scaled one.
ROUNDING = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 3e-2}


@st.composite
def low_ranks(draw, out: int | None = None, into: int | None = None, dtype: torch.dtype | None = None) -> LowRank:
    """Any shape, rank (larger than the shape too), scale and dtype."""
    dtype = dtype or draw(st.sampled_from(list(DTYPES.values())))
    out, into, rank = out or draw(sizes), into or draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    B = torch.randn(out, rank, generator=generator).to(dtype)
    A = torch.randn(rank, into, generator=generator).to(dtype)
    return LowRank(B, A, draw(scales))


def exact(matrix: LowRank) -> Tensor:
    """scale · Σ_k B_k A_k in fp64, entry by entry."""
    B, A = matrix.B.double(), matrix.A.double()
    rows = [
        [matrix.scale * sum(B[i, k] * A[k, j] for k in range(matrix.rank)) for j in range(A.shape[1])]
        for i in range(B.shape[0])
    ]
    return torch.tensor(rows, dtype=torch.float64).view(B.shape[0], A.shape[1])


def size(matrix: LowRank) -> float:
    """What rounding is relative to: |scale| ‖B‖ ‖A‖, larger than the norm of B A where terms cancel."""
    return abs(matrix.scale) * float(matrix.B.double().norm() * matrix.A.double().norm())


def agrees(found: Tensor, expected: Tensor, scale: float, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) <= ROUNDING[dtype] * scale


@given(low_ranks())
def test_dense_shape_transpose_negation_and_multiples(m: LowRank):
    expected = exact(m)
    agrees(m.dense(), expected, size(m), m.B.dtype)
    assert m.dense().dtype == m.B.dtype
    assert m.shape == tuple(expected.shape)
    assert m.T.shape == tuple(expected.T.shape)
    agrees(m.T.dense(), expected.T, size(m), m.B.dtype)
    agrees((-m).dense(), -expected, size(m), m.B.dtype)
    agrees((m * 3.0).dense(), 3 * expected, 3 * size(m), m.B.dtype)
    agrees((3.0 * m).dense(), 3 * expected, 3 * size(m), m.B.dtype)


@given(low_ranks(), st.sampled_from([(), (3,), (2, 3)]))
def test_apply(m: LowRank, batch: tuple[int, ...]):
    x = torch.randn(*batch, m.shape[1], dtype=torch.float64).to(m.B.dtype)
    agrees(m.apply(x), x.double() @ exact(m).T, size(m) * float(x.double().norm()), m.B.dtype)


@given(st.data())
def test_sums_and_inner_products(data: st.DataObject):
    a = data.draw(low_ranks())
    b = data.draw(low_ranks(*a.shape, dtype=a.B.dtype))
    total = size(a) + size(b)
    agrees((a + b).dense(), exact(a) + exact(b), total, a.B.dtype)
    agrees((a - b).dense(), exact(a) - exact(b), total, a.B.dtype)
    assert (a + b).rank == a.rank + b.rank
    agrees(a.inner(b), (exact(a) * exact(b)).sum(), size(a) * size(b), a.B.dtype)


def test_a_sum_with_a_zero_scale_keeps_the_other_term():
    zero = LowRank(torch.ones(2, 1), torch.ones(1, 3), 0.0)
    other = LowRank(torch.ones(2, 1), torch.ones(1, 3), 2.0)
    for total in (zero + other, other + zero):
        assert torch.equal(total.dense(), torch.full((2, 3), 2.0))


@given(low_ranks())
def test_norm_and_svd(m: LowRank):
    expected = exact(m)
    agrees(m.norm(), expected.norm(), size(m), m.B.dtype)
    u, s, v = m.svd()
    assert len(s) == min(m.rank, *m.shape)
    assert bool((s[:-1] >= s[1:]).all()) and bool((s >= 0).all())
    agrees(u.double() * s.double() @ v.double().T, expected, size(m), m.B.dtype)
    eye = torch.eye(len(s), dtype=torch.float64)
    tolerance = ROUNDING[m.B.dtype] * len(s)
    assert relative(u.double().T @ u.double(), eye) < tolerance
    assert relative(v.double().T @ v.double(), eye) < tolerance
    # The largest min(r, out, in) singular values are all there are.
    agrees(s, torch.linalg.svdvals(expected)[: len(s)], size(m), m.B.dtype)


@given(low_ranks(), st.integers(1, 9))
def test_truncate_is_the_best_approximation_of_its_rank(m: LowRank, rank: int):
    u, s, vh = torch.linalg.svd(exact(m), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    kept = m.truncate(rank)
    assert kept.rank <= rank
    # By its distance: the best approximation itself need not be unique.
    gap, optimum = (exact(m) - kept.dense().double()).norm(), (exact(m) - best).norm()
    assert float(gap - optimum) <= ROUNDING[m.B.dtype] * size(m)


def test_a_norm_of_a_nearly_cancelling_difference_keeps_its_digits():
    B, A = torch.randn(50, 4), torch.randn(4, 40)
    nudge = 1e-4 * torch.randn(50, 4)
    found = (LowRank(B + nudge, A) - LowRank(B, A)).norm()
    expected = ((B + nudge).double() @ A.double() - B.double() @ A.double()).norm()
    assert abs(float(found / expected) - 1) < 2e-3  # through ‖a‖² − 2⟨a, b⟩ + ‖b‖² nothing of it would be left


def test_nothing_of_size_out_by_in_is_formed():
    huge = LowRank(torch.randn(2_000_000, 2), torch.randn(2, 2_000_000), 0.5)  # 16 TB dense
    assert torch.isfinite(huge.norm())
    assert huge.truncate(1).T.shape == (2_000_000, 2_000_000)
    assert torch.isfinite((huge + huge).inner(huge))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), scales)
def test_difference_is_BA_minus_B0A0(out: int, into: int, rank: int, scale: float):
    dB, B0 = torch.randn(2, out, rank, dtype=torch.float64)
    dA, A0 = torch.randn(2, rank, into, dtype=torch.float64)
    found = difference(dB, dA, B0, A0, scale)
    expected = scale * ((B0 + dB) @ (A0 + dA) - B0 @ A0)
    assert found.rank == 2 * rank
    torch.testing.assert_close(found.dense(), expected, rtol=1e-12, atol=1e-12)


def test_difference_at_the_start_is_exactly_zero_in_every_dtype():
    for dtype in DTYPES.values():
        B0, A0 = torch.randn(33, 4).to(dtype) * 1e3, torch.randn(4, 21).to(dtype)
        assert not difference(torch.zeros_like(B0), torch.zeros_like(A0), B0, A0, 2.0).dense().any()


def _spectrum(shape: tuple[int, int], decay: float) -> Tensor:
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64))
    return u * decay ** torch.arange(min(shape), dtype=torch.float64) @ v.T


@pytest.mark.parametrize("shape", [(30, 20), (400, 300), (300, 400), (1000, 150)], ids=str)
@pytest.mark.parametrize("decay", [0.7, 0.98], ids=["fast", "slow"])
def test_truncated_svd_against_the_exact_one(shape: tuple[int, int], decay: float):
    matrix, k = _spectrum(shape, decay), 8
    u, s, v = truncated_svd(matrix, k, torch.Generator().manual_seed(3))
    exact_u, exact_s, _ = torch.linalg.svd(matrix, full_matrices=False)
    assert u.shape == (shape[0], k) and s.shape == (k,) and v.shape == (shape[1], k)
    assert relative(s, exact_s[:k]) < 1e-3
    assert relative(u.T @ u, torch.eye(k, dtype=torch.float64)) < 1e-10
    assert relative(v.T @ v, torch.eye(k, dtype=torch.float64)) < 1e-10
    kept = (exact_u[:, :k].T @ u).square().sum() / k
    assert kept > 0.999 if decay < 0.9 else kept > 0.97
    best = exact_s[k:].square().sum().sqrt()
    assert (matrix - u * s @ v.T).norm() < best * 1.001


def test_truncated_svd_depends_on_its_generator_only():
    matrix = torch.randn(400, 300)
    torch.manual_seed(1)
    first = truncated_svd(matrix, 4, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    second = truncated_svd(matrix, 4, torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_captured_is_the_share_of_the_energy():
    matrix = _spectrum((20, 10), 0.5)
    s = torch.linalg.svdvals(matrix)
    assert captured(s, float(matrix.square().sum())) == pytest.approx(1.0)
    assert captured(s[:1], float(matrix.square().sum())) == pytest.approx(float(s[0] ** 2 / (s**2).sum()))
    assert captured(s, 0.0) == 0.0


@pytest.mark.parametrize("shape", [(40, 60), (300, 400)])  # the exact and the randomised path
def test_the_signs_of_singular_vectors_do_not_depend_on_the_scale_of_the_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -3, shape[1])
    found = [truncated_svd(c * matrix, 8, torch.Generator().manual_seed(0)) for c in (1.0, 1e-3, 1e3, -1.0)]
    for u, _, v in found[1:3]:
        torch.testing.assert_close(u, found[0][0], rtol=0, atol=2e-3)
        torch.testing.assert_close(v, found[0][2], rtol=0, atol=2e-3)
    torch.testing.assert_close(found[3][0], -found[0][0], rtol=0, atol=2e-3)  # V keeps its sign, U takes −1
