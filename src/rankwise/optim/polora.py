"""PoLoRA: a polar step for each half of the pair, behind Adafactor's row and column scales (arXiv 2607.17620).

q [in] and p [out] estimate the second moments of G's columns and rows; q̂ = q / max q + δ, p̂ likewise. With the
look-ahead momenta M̂ of g_A = s BᵀG and g_B = s GAᵀ,

    C_B = Bᵀ diag(p̂) B,    D_A = C_B^-½ msign(C_B^-½ M̂_A diag(q̂)^-½) diag(q̂)^-½
    C_A = A diag(q̂) Aᵀ,    D_B = diag(p̂)^-½ msign(diag(p̂)^-½ M̂_B C_A^-½) C_A^-½
    dA = ρ D_A / ‖D_A‖₂,    dB = ρ D_B / ‖D_B‖₂,    ρ = 1 / (s (‖A‖₂ + ‖B‖₂))

so that a step of rate η moves W by at most η in spectral norm, whatever alpha: ‖s(B dA + dB A)‖₂ ≤ 1. Then

    q ← β₂ q + (1 − β₂) diag(g_Aᵀ C_B⁻¹ g_A) / r,    p ← β₂ p + (1 − β₂) diag(g_B C_A⁻¹ g_Bᵀ) / r

Roots and inverses are pseudo-inverses from SVDs of the weighted halves. With B = 0 only B moves, and only p learns.

Departs from the paper in 1/s, which makes the rate a distance in W; in the exact sign; and in that q and p begin at
zero, which stands for all equal, where the paper begins at a small number. Rotations of the pair change nothing in W;
A → TA, B → BT⁻¹ with another T changes ρ.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.algebra.msign import msign, spectral_norm, thin_svd
from rankwise.optim.checks import check_betas, check_number
from rankwise.optim.choice import choice_of
from rankwise.optim.elementwise import momentum
from rankwise.optim.pair_optimizer import PairOptimizer
from rankwise.pair import Pair
from rankwise.shapes import Float


def direction(
    A: Float[Tensor, "*n r in"],
    B: Float[Tensor, "*n out r"],
    grad_A: Float[Tensor, "*n r in"],
    grad_B: Float[Tensor, "*n out r"],
    scale: float,
    state: dict[str, Any],
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    delta: float = 1e-4,
    unit: Float[Tensor, "*n"] | float = 1.0,
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """(dA, dB) of the formulas above.

    Args:
        A, B: the effective pair (start + δ), or a batch of pairs of equal shape.
        grad_A, grad_B: dL/dA = s BᵀG and dL/dB = s GAᵀ.
        scale: s.
        state: the pair's momenta, q and p; empty before the first step, updated in place.
        betas: β₁ of the momenta, β₂ of q and p.
        delta: δ, the floor of q̂ and p̂.
        unit: the most, in spectral norm, that a step of rate 1 moves W, for each pair.
    """
    columns = state.setdefault("columns", torch.zeros_like(A[..., 0, :]))
    rows = state.setdefault("rows", torch.zeros_like(B[..., 0]))
    M_A = momentum(grad_A, state, "momentum_A", betas[0])
    M_B = momentum(grad_B, state, "momentum_B", betas[0])
    root_q, root_p = _scales(columns, delta).sqrt(), _scales(rows, delta).sqrt()
    C_A, C_B = _inverse_root(A.mT, root_q), _inverse_root(B, root_p)
    total = spectral_norm(A) + spectral_norm(B)
    rho = torch.as_tensor(unit, dtype=A.dtype, device=A.device) / (scale * torch.where(total > 0, total, 1.0))
    dA = rho[..., None, None] * _polar(M_A.mT, root_q, C_B).mT
    dB = rho[..., None, None] * _polar(M_B, root_p, C_A)
    columns.lerp_((C_B.mT @ grad_A).square().mean(-2), 1 - betas[1])
    rows.lerp_((grad_B @ C_A).square().mean(-1), 1 - betas[1])
    return dA, dB


def _scales(moments: Float[Tensor, "*n m"], delta: float) -> Float[Tensor, "*n m"]:
    """q̂ = q / max q + δ, and 1 + δ where nothing is known."""
    largest = moments.amax(-1, keepdim=True)
    return torch.where(largest > 0, moments / torch.where(largest > 0, largest, 1.0), 1.0) + delta


def _inverse_root(half: Float[Tensor, "*n m r"], root: Float[Tensor, "*n m"]) -> Float[Tensor, "*n r k"]:
    """V diag(1/σ) of the weighted half: C^-½ but for a rotation that leaves every formula."""
    f = thin_svd(root[..., None] * half)
    return f.V * f.inverse[..., None, :]


def _polar(
    M: Float[Tensor, "*n m r"], root: Float[Tensor, "*n m"], C: Float[Tensor, "*n r k"]
) -> Float[Tensor, "*n m r"]:
    """D_B / ‖D_B‖₂ from M̂_B, √p̂ and C_A^-½; zero where D_B is."""
    D = msign(M / root[..., None] @ C) @ C.mT / root[..., None]
    norm = spectral_norm(D)[..., None, None]
    return D / torch.where(norm > 0, norm, 1.0)


class Polora(PairOptimizer):
    """PoLoRA on typed pairs. ``lr`` bounds how far a step moves W, in spectral norm.

    Args:
        pairs, others: as for :class:`~rankwise.optim.spectral.Spectral`.
        betas, delta: β₁, β₂ and δ of the formulas above.
    """

    others_lr: ClassVar[float | None] = 2e-4

    def __init__(
        self,
        pairs: Iterable[Pair],
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        delta: float = 1e-4,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
    ) -> None:
        check_betas(betas)
        check_number("delta", delta, above_zero=True)
        options = {"betas": tuple(betas), "delta": delta}
        super().__init__(pairs, direction, options, lr=lr, weight_decay=weight_decay, others=others)


PoloraChoice = choice_of(Polora)
