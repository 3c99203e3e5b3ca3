"""Scaled Adam: each half's gradient divided by the other half's Gram matrix, then Adam (arXiv 2402.02347).

With g_A = s BᵀG and g_B = s GAᵀ,

    dA = adam((BᵀB + δI)⁻¹ g_A),    dB = adam(g_B (AAᵀ + δI)⁻¹)

The rate is Adam's: what an element of A or B moves by. The preconditioned gradients would move W alike for any balance
of A and B; Adam, element by element, does not keep that. With B = 0 only B moves.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rankwise.optim.checks import check_betas, check_number
from rankwise.optim.choice import choice_of
from rankwise.optim.elementwise import adam_direction
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
    scaled_A = _divided(grad_A.mT, B, delta).mT
    scaled_B = _divided(grad_B, A.mT, delta)
    return adam_direction(scaled_A, state, betas, eps, "A_"), adam_direction(scaled_B, state, betas, eps, "B_")


def _divided(
    gradient: Float[Tensor, "*n m r"], other: Float[Tensor, "*n k r"], delta: float
) -> Float[Tensor, "*n m r"]:
    """g (otherᵀ other + δI)⁻¹, by the singular values of ``other`` and not their squares' sum."""
    _, S, Vh = torch.linalg.svd(torch.linalg.qr(other).R)
    weights = torch.full_like(Vh[..., 0], 1 / delta)
    weights[..., : S.shape[-1]] = (S.square() + delta).reciprocal()
    divided: Tensor = gradient @ (Vh.mT * weights[..., None, :]) @ Vh
    return divided


class ScaledAdam(PairOptimizer):
    """Scaled Adam on typed pairs; ``lr`` is Adam's.

    Args:
        pairs, others: as for :class:`~rankwise.optim.spectral.Spectral`.
        betas, eps, delta: of the formulas above.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta: float = 1e-6,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
    ) -> None:
        check_betas(betas)
        check_number("eps", eps, above_zero=True)
        check_number("delta", delta, above_zero=True)
        options = {"betas": tuple(betas), "eps": eps, "delta": delta}
        super().__init__(pairs, direction, options, lr=lr, weight_decay=weight_decay, others=others)


ScaledAdamChoice = choice_of(ScaledAdam)
