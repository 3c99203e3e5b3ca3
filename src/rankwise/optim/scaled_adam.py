"""Scaled Adam: each half's gradient divided by the other half's Gram matrix, then Adam (arXiv 2402.02347).

With g_A = s BᵀG and g_B = s GAᵀ,

    dA = adam((BᵀB + δI)⁻¹ g_A),    dB = adam(g_B (AAᵀ + δI)⁻¹)

The rate is Adam's: what an element of A or B moves by. The preconditioned gradients would move W alike for any balance
of A and B; Adam, element by element, does not keep that. With B = 0 only B moves.
"""

from typing import Any

import torch
from torch import Tensor

from rankwise.optim.moments import adam
from rankwise.shapes import Float


def direction(
    A: Float[Tensor, "*n r in"],
    B: Float[Tensor, "*n out r"],
    grad_A: Float[Tensor, "*n r in"],
    grad_B: Float[Tensor, "*n out r"],
    scale: float,
    state: dict[str, Any],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    delta: float = 1e-6,
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """(dA, dB) of the formulas above.

    Args:
        A, B: the effective pair (start + δ), or a batch of pairs of equal shape.
        grad_A, grad_B: dL/dA = s BᵀG and dL/dB = s GAᵀ.
        scale: s; it enters through the gradients alone.
        state: the pair's moments; empty before the first step, updated in place.
        betas, eps: Adam's.
        delta: δ.
    """
    state["step"] = state.get("step", 0) + 1
    scaled_A = _divided(grad_A.mT, B, delta).mT
    scaled_B = _divided(grad_B, A.mT, delta)
    return adam(scaled_A, state, "A", betas, eps), adam(scaled_B, state, "B", betas, eps)


def _divided(
    gradient: Float[Tensor, "*n m r"], other: Float[Tensor, "*n k r"], delta: float
) -> Float[Tensor, "*n m r"]:
    """g (otherᵀ other + δI)⁻¹, by the singular values of ``other`` and not their squares' sum."""
    _, S, Vh = torch.linalg.svd(torch.linalg.qr(other).R)
    weights = torch.full_like(Vh[..., 0], 1 / delta)
    weights[..., : S.shape[-1]] = (S.square() + delta).reciprocal()
    divided: Tensor = gradient @ (Vh.mT * weights[..., None, :]) @ Vh
    return divided
