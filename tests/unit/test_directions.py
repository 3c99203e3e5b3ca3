"""Directions of the pair optimizers: each against its formulas written out with dense matrices, and by their laws.

A method is one row of METHODS.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.algebra.msign import msign, spectral_norm, thin_svd
from rankwise.optim import loft, lora_muon, polora, scaled_adam, spectral

Step = tuple[Tensor, Tensor]
Dense = Callable[[Tensor, Tensor, Tensor, Tensor], Step]  # (A, B, g_A, g_B) → (dA, dB), with a memory of its own

pinv = torch.linalg.pinv


# --- the formulas, written out ---------------------------------------------------------------------------------------


def power(S: Tensor, exponent: float) -> Tensor:
    """Of a symmetric matrix, on its range."""
    values, vectors = torch.linalg.eigh(S)
    kept = values > values.max().clamp_min(1e-300) * 1e-12
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


def sign_of(M: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    kept = S.max() * 1e-10 < S
    return U[:, kept] @ Vh[kept]


def norm_2(M: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(M, 2)


def averaged(beta: float) -> Callable[[Tensor], Tensor]:
    """Momentum with its look-ahead."""
    M: Tensor | float = 0.0

    def step(g: Tensor) -> Tensor:
        nonlocal M
        M = beta * M + (1 - beta) * g
        return beta * M + (1 - beta) * g

    return step


def dense_spectral(s: float, beta: float = 0.8) -> Dense:
    of_A, of_B = averaged(beta), averaged(beta)

    def step(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor) -> Step:
        M_A, M_B = of_A(g_A), of_B(g_B)
        P_A, P_B, eye = pinv(A) @ A, B @ pinv(B), torch.eye(len(B), dtype=B.dtype)
        seen_by_A, seen_by_B = pinv(B).T @ M_A / s, M_B @ pinv(A).T / s  # P_B G and G P_A
        S = sign_of(seen_by_A + (eye - P_B) @ seen_by_B @ P_A)
        T = S - (eye - P_B) @ S @ (torch.eye(len(P_A), dtype=B.dtype) - P_A)
        D = T / norm_2(T).clamp_min(1e-300)
        return pinv(B) @ D / s, (eye - P_B) @ D @ pinv(A) / s

    return step


def dense_lora_muon(s: float, beta: float = 0.8) -> Dense:
    of_A, of_B = averaged(beta), averaged(beta)

    def step(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor) -> Step:
        M_A, M_B = of_A(g_A), of_B(g_B)
        S_A, S_B = power(A @ A.T, -0.5), power(B.T @ B, -0.5)
        return S_B @ sign_of(S_B @ M_A) / (2 * s), sign_of(M_B @ S_A) @ S_A / (2 * s)

    return step


def dense_polora(s: float, beta: float = 0.9, beta2: float = 0.99, delta: float = 1e-4) -> Dense:
    of_A, of_B = averaged(beta), averaged(beta)
    q: Tensor | float = 1e-40
    p: Tensor | float = 1e-40

    def step(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor) -> Step:
        nonlocal q, p
        q, p = q * torch.ones_like(A[0]), p * torch.ones_like(B[:, 0])
        M_A, M_B = of_A(g_A), of_B(g_B)
        Q, P = torch.diag(q / q.max() + delta), torch.diag(p / p.max() + delta)
        C_A, C_B = A @ Q @ A.T, B.T @ P @ B
        Q_, P_ = power(Q, -0.5), power(P, -0.5)
        D_A = power(C_B, -0.5) @ sign_of(power(C_B, -0.5) @ M_A @ Q_) @ Q_
        D_B = P_ @ sign_of(P_ @ M_B @ power(C_A, -0.5)) @ power(C_A, -0.5)
        rho = 1 / s / (norm_2(A) + norm_2(B))
        q = beta2 * q + (1 - beta2) / len(A) * (g_A.T @ power(C_B, -1.0) @ g_A).diag()
        p = beta2 * p + (1 - beta2) / len(A) * (g_B @ power(C_A, -1.0) @ g_B.T).diag()
        return rho * D_A / norm_2(D_A).clamp_min(1e-300), rho * D_B / norm_2(D_B).clamp_min(1e-300)

    return step


def dense_adam(betas: tuple[float, float], eps: float) -> Callable[[Tensor], Tensor]:
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    t = 0

    def step(g: Tensor) -> Tensor:
        nonlocal m, v, t
        m, v, t = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2, t + 1
        return m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return step


def dense_scaled_adam(s: float, delta: float = 1e-6) -> Dense:
    of_A, of_B = dense_adam((0.9, 0.999), 1e-8), dense_adam((0.9, 0.999), 1e-8)

    def step(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor) -> Step:
        floor = delta * torch.eye(len(A), dtype=A.dtype)
        return of_A(torch.linalg.inv(B.T @ B + floor) @ g_A), of_B(g_B @ torch.linalg.inv(A @ A.T + floor))

    return step


def dense_loft(s: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Dense:
    """Adam's moments of G P_A and of Gᵀ P_B themselves: m [out, in], and Σ g_i gᵢᵀ as an in × in matrix a row."""

    def half() -> Callable[[Tensor, Tensor, int, bool], Tensor]:
        m: Tensor | float = 0.0
        v: Tensor | float = 0.0

        def step(seen: Tensor, A: Tensor, t: int, move: bool) -> Tensor:
            nonlocal m, v
            P = pinv(A) @ A
            G = seen @ pinv(A).T / s  # G P_A
            m = betas[0] * (m @ P if t > 1 else 0.0) + (1 - betas[0]) * G
            v = betas[1] * (P @ v @ P if t > 1 else 0.0) + (1 - betas[1]) * G[:, :, None] * G[:, None, :]
            size = (v.diagonal(dim1=1, dim2=2).clamp_min(0) / (1 - betas[1] ** t)).sqrt()
            N = m / (1 - betas[0] ** t) / (size + eps)
            return move * N @ pinv(A) / s

        return step

    of_A, of_B, t = half(), half(), 0

    def step(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor) -> Step:
        nonlocal t
        t += 1
        return of_A(g_A.T, B.T, t, t % 2 == 0).T, of_B(g_B, A, t, t % 2 == 1)

    return step


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One method and its claims.

    Attributes:
        direction: the function under test. dense: scale → its formulas written out.
        balance: A → TA, B → BT⁻¹ changes nothing in W: for any T, for rotations only, or not at all.
        scale_free: s may change; W moves the same.
        distance: the most that a step of rate 1 moves W in spectral norm, where the rate is a distance.
    """

    direction: Callable[..., Step]
    dense: Callable[[float], Dense]
    balance: str = "none"
    scale_free: bool = False
    distance: float | None = None


METHODS = {
    "spectral": Method(spectral.direction, dense_spectral, "any", scale_free=True, distance=1.0),
    "polora": Method(polora.direction, dense_polora, "rotations", distance=1.0),
    "lora-muon": Method(lora_muon.direction, dense_lora_muon, "any", scale_free=True, distance=1.0),
    "scaled-adam": Method(scaled_adam.direction, dense_scaled_adam),
    "loft": Method(loft.direction, dense_loft, "any", scale_free=True),
}
SHAPES = [(12, 9, 4), (9, 12, 4), (10, 10, 1), (6, 5, 5), (3, 14, 3)]  # out, in, r
STARTS = ["both", "B = 0", "A = 0", "lost rank"]

every_method = pytest.mark.parametrize("name", METHODS)
with_a_distance = pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.distance is not None])


def conditioned(n: int, r: int, rng: torch.Generator) -> Tensor:
    """A random [n, r] matrix with singular values from 2 down to 1."""
    U, _, Vh = torch.linalg.svd(torch.randn(n, r, generator=rng, dtype=torch.float64), full_matrices=False)
    return U * torch.linspace(2, 1, r, dtype=torch.float64) @ Vh


def start(shape: tuple[int, int, int], kind: str = "both", seed: int = 0) -> Step:
    out, into, r = shape
    rng = torch.Generator().manual_seed(seed)
    A, B = conditioned(into, r, rng).T.contiguous(), conditioned(out, r, rng)
    if kind == "lost rank" and r > 1:
        A[0], B[:, -1] = 0.0, 0.0
    return A * (kind != "A = 0"), B * (kind != "B = 0")


def gradients_of_W(shape: tuple[int, int, int], steps: int, seed: int = 1) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape[:2], generator=rng, dtype=torch.float64) for _ in range(steps)]


def run(
    direction: Callable[[Tensor, Tensor, Tensor, Tensor, float, dict[str, Any]], Step],
    pair: Step,
    gradients: Sequence[Tensor],
    s: float,
    lr: float = 0.05,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(A, B, dA, dB) of every step from a start, along given gradients of W."""
    A, B = (half.to(dtype) for half in pair)
    state: dict[str, Any] = {}
    steps = []
    for G in gradients:
        G = G.to(dtype)
        dA, dB = direction(A, B, s * B.mT @ G, s * G @ A.mT, s, state)
        steps.append((A, B, dA, dB))
        A, B = A - lr * dA, B - lr * dB
    return steps


def moved(step: tuple[Tensor, Tensor, Tensor, Tensor], s: float) -> Tensor:
    """What a direction is to W, to first order."""
    A, B, dA, dB = step
    return s * (B @ dA + dB @ A)


def distance(got: Tensor, expected: Tensor) -> float:
    """In the Frobenius norm, as a share of what is expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


# --- against the formulas --------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("s", [0.25, 3.0])
def test_direction_is_its_formula(name: str, shape: tuple[int, int, int], kind: str, s: float) -> None:
    method = METHODS[name]
    dense = method.dense(s)
    gradients = gradients_of_W(shape, 4)
    for (A, B, dA, dB), G in zip(run(method.direction, start(shape, kind), gradients, s), gradients, strict=True):
        expected = dense(A, B, s * B.T @ G, s * G @ A.T)
        assert distance(torch.cat([dA, dB.T], 1), torch.cat([expected[0], expected[1].T], 1)) < 1e-9


@every_method
def test_single_precision_is_close_to_double(name: str) -> None:
    pair, gradients = start((40, 30, 4)), gradients_of_W((40, 30, 4), 3)
    single = run(METHODS[name].direction, pair, gradients, 2.0, dtype=torch.float32)
    double = run(METHODS[name].direction, pair, gradients, 2.0)
    for got, expected in zip(single, double, strict=True):
        assert distance(moved(got, 2.0), moved(expected, 2.0)) < 1e-3


@every_method
def test_a_batch_of_pairs_is_the_pairs_one_by_one(name: str) -> None:
    shape, direction = (12, 9, 4), METHODS[name].direction
    starts = [start(shape, kind, seed) for seed, kind in enumerate(STARTS)]
    gradients = [gradients_of_W(shape, 3, seed) for seed in range(len(starts))]
    together = run(
        direction,
        tuple(torch.stack(h) for h in zip(*starts, strict=True)),
        list(map(torch.stack, zip(*gradients, strict=True))),
        2.0,
    )
    for i, (pair, along) in enumerate(zip(starts, gradients, strict=True)):
        for batched, single in zip(together, run(direction, pair, along, 2.0), strict=True):
            torch.testing.assert_close(tuple(t[i] for t in batched), single)


# --- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.balance != "none"])
@pytest.mark.parametrize("kind", STARTS)
def test_balance_of_the_halves_changes_nothing_in_W(name: str, kind: str) -> None:
    A, B = start((12, 9, 4), kind)
    T = torch.randn(4, 4, dtype=A.dtype)
    # The pseudo-inverse of a half that has lost rank turns with rotations only.
    T = torch.linalg.qr(T).Q if METHODS[name].balance == "rotations" or kind == "lost rank" else T
    gradients = gradients_of_W((12, 9, 4), 4)
    plain = run(METHODS[name].direction, (A, B), gradients, 2.0)
    turned = run(METHODS[name].direction, (T @ A, B @ torch.linalg.inv(T)), gradients, 2.0)
    for one, other in zip(plain, turned, strict=True):
        torch.testing.assert_close(moved(one, 2.0), moved(other, 2.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.scale_free])
def test_scale_changes_nothing_in_W(name: str) -> None:
    """From B = 0, where the product grows by the steps alone; A is the same, s differs."""
    gradients = gradients_of_W((12, 9, 4), 4)
    small = run(METHODS[name].direction, start((12, 9, 4), "B = 0"), gradients, 0.5)
    large = run(METHODS[name].direction, start((12, 9, 4), "B = 0"), gradients, 4.0)
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(moved(one, 0.5), moved(other, 4.0), rtol=1e-6, atol=1e-6)


@with_a_distance
@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_in_W_is_bounded(name: str, kind: str, dtype: torch.dtype) -> None:
    longest = METHODS[name].distance
    assert longest is not None
    for shape in SHAPES:
        for step in run(METHODS[name].direction, start(shape, kind), gradients_of_W(shape, 4), 3.0, dtype=dtype):
            assert float(norm_2(moved(step, 3.0))) < longest * (1 + 1e-4)


@pytest.mark.parametrize("kind", STARTS)
def test_spectral_step_moves_W_by_its_rate_exactly(kind: str) -> None:
    for s in (0.1, 7.0):
        for step in run(spectral.direction, start((12, 9, 4), kind), gradients_of_W((12, 9, 4), 4), s):
            assert float(norm_2(moved(step, s))) == pytest.approx(1.0, rel=1e-9)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_B_moves_from_B_equal_to_zero(name: str, dtype: torch.dtype) -> None:
    _, _, dA, dB = run(
        METHODS[name].direction, start((12, 9, 4), "B = 0"), gradients_of_W((12, 9, 4), 1), 2.0, dtype=dtype
    )[0]
    assert not dA.any() and dB.all()


@every_method
def test_zero_gradient_moves_nothing(name: str) -> None:
    for kind in STARTS:
        pair = start((12, 9, 4), kind)
        for _, _, dA, dB in run(METHODS[name].direction, pair, [torch.zeros(12, 9)] * 2, 2.0):
            assert not dA.any() and not dB.any()


@with_a_distance
@pytest.mark.parametrize("size", [1e-12, 1e8])
def test_size_of_the_gradient_does_not_count(name: str, size: float) -> None:
    gradients = gradients_of_W((12, 9, 4), 3)
    plain = run(METHODS[name].direction, start((12, 9, 4)), gradients, 2.0, dtype=torch.float32)
    sized = run(METHODS[name].direction, start((12, 9, 4)), [size * G for G in gradients], 2.0, dtype=torch.float32)
    for one, other in zip(plain, sized, strict=True):
        assert distance(moved(other, 2.0), moved(one, 2.0)) < 1e-3


@every_method
def test_state_resumes_bit_for_bit(name: str) -> None:
    """It holds tensors and numbers only, and a copy through a file goes on as the original does."""
    shape, direction = (12, 9, 4), METHODS[name].direction
    state: dict[str, Any] = {}
    (A, B), gradients = start(shape, "B = 0"), gradients_of_W(shape, 4)
    for number, G in enumerate(gradients):
        if number == 2:
            file = io.BytesIO()
            torch.save(state, file)
            copy = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        dA, dB = direction(A, B, B.T @ G, G @ A.T, 1.0, state)
        if number >= 2:
            again = direction(A, B, B.T @ G, G @ A.T, 1.0, copy)
            assert torch.equal(dA, again[0]) and torch.equal(dB, again[1])
        A, B = A - 0.1 * dA, B - 0.1 * dB


@every_method
def test_arguments_are_left_alone(name: str) -> None:
    A, B = start((12, 9, 4))
    G = gradients_of_W((12, 9, 4), 1)[0]
    arguments = (A, B, B.T @ G, G @ A.T)
    before = [t.clone() for t in arguments]
    state: dict[str, Any] = {}
    for _ in range(2):
        METHODS[name].direction(*arguments, 1.0, state)
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))


@with_a_distance
def test_unit_multiplies_the_step(name: str) -> None:
    A, B = (torch.stack(h) for h in zip(start((12, 9, 4)), start((12, 9, 4), seed=5), strict=True))
    G = gradients_of_W((12, 9, 4), 1)[0]
    plain = METHODS[name].direction(A, B, B.mT @ G, G @ A.mT, 1.0, {})
    sized = METHODS[name].direction(A, B, B.mT @ G, G @ A.mT, 1.0, {}, unit=torch.tensor([2.0, 0.5]))
    for one, other in zip(plain, sized, strict=True):
        torch.testing.assert_close(other[0], 2.0 * one[0])
        torch.testing.assert_close(other[1], 0.5 * one[1])


# --- the matrix sign -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (5, 5), (3, 20, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_msign_is_the_orthogonal_factor(shape: tuple[int, ...], dtype: torch.dtype, condition: float) -> None:
    """Known by its two properties: sign · signᵀ is the identity on the range, and signᵀ M is symmetric and ≥ 0."""
    k = min(shape[-2:])
    M = torch.randn(shape, dtype=dtype)
    M = (M if shape[-2] == k else M.mT) if shape[-2] <= shape[-1] else M.mT  # wide
    M = torch.logspace(0, -float(torch.tensor(condition).log10()), k, dtype=dtype)[:, None] * M
    M = M if shape[-2] <= shape[-1] else M.mT
    sign = msign(M)
    near = {"atol": 1e-4 if dtype == torch.float32 else 1e-10, "rtol": 0.0}
    gram = sign @ sign.mT if shape[-2] <= shape[-1] else sign.mT @ sign
    torch.testing.assert_close(gram, torch.eye(k, dtype=dtype).expand_as(gram), **near)
    root = M @ sign.mT if shape[-2] <= shape[-1] else sign.mT @ M
    torch.testing.assert_close(root, root.mT, **near)
    assert float(torch.linalg.eigvalsh(root.double()).min()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_msign_leaves_lost_directions_at_zero(dtype: torch.dtype) -> None:
    M = torch.randn(20, 3, dtype=dtype) @ torch.randn(3, 8, dtype=dtype)
    assert int(torch.linalg.matrix_rank(msign(M))) == 3
    assert not msign(torch.zeros(4, 2, dtype=dtype)).any()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_thin_svd_inverts_on_the_range(size: float) -> None:
    M = size * torch.randn(10, 3)
    M[:, 1] = M[:, 0]
    f = thin_svd(M)
    torch.testing.assert_close((f.U * f.S) @ f.V.T / size, M / size)
    torch.testing.assert_close(f.S * f.inverse, torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_spectral_norm(size: float) -> None:
    M = size * torch.randn(2, 7, 3)
    torch.testing.assert_close(spectral_norm(M), norm_2(M))
    torch.testing.assert_close(spectral_norm(M.mT), norm_2(M))
