"""LoFT: full fine-tuning's AdamW as seen from one half of the pair, the halves in turn (arXiv 2505.21289).

For B, with A held: GAᵀ(AAᵀ)⁻¹ = g_B (AAᵀ)⁻¹ / s are the coordinates of G on A's rows. Adam's moments of G P_A are kept
in them, m [out, r] and v [out, r, r], an r × r matrix for each row of W, and turned when A has moved:

    C = A_old Aᵀ (AAᵀ)⁻¹,    g = g_B (AAᵀ)⁻¹ / s
    m ← β₁ m C + (1 − β₁) g,    v_i ← β₂ Cᵀ v_i C + (1 − β₂) g_iᵀ g_i
    N_ij = (m̂A)_ij / (√(a_jᵀ v̂_i a_j) + eps)        [out, in], a_j the columns of A
    dB = N Aᵀ (AAᵀ)⁻¹ / s

and for A likewise with Wᵀ. Both halves' moments see every step; B moves in the first, third, … step, A in the others.
At full rank it is AdamW on W, and the rate is the one that AdamW would have there: what an element of W moves by.

N is made a few rows at a time. That takes out · in · r² operations a pair and step, r times what the step's gradients
take for a token or two each: for small ranks only.

Inverses are pseudo-inverses. Departs from the authors' code (github.com/tnurbek/loft) in them, in s, and in that v
turns by Cᵀ v C for B as the paper has it, where the code has C v Cᵀ.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.algebra.msign import thin_svd
from rankwise.optim.checks import check_betas, check_number
from rankwise.optim.choice import choice_of
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
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """(dA, dB) of the formulas above, one of them zero.

    Args:
        A, B: the effective pair (start + δ), or a batch of pairs of equal shape.
        grad_A, grad_B: dL/dA = s BᵀG and dL/dB = s GAᵀ.
        scale: s.
        state: the pair's moments, and A and B as they were; empty before the first step, updated in place.
        betas, eps: Adam's.
    """
    step = state["step"] = state.get("step", 0) + 1
    inverse_A, inverse_B = _pseudo_inverse(A), _pseudo_inverse(B.mT)
    _update(state, "B", grad_B / scale, A, inverse_A, betas)
    _update(state, "A", grad_A.mT / scale, B.mT, inverse_B, betas)
    corrections = 1 - betas[0] ** step, 1 - betas[1] ** step
    if step % 2 == 1:
        return torch.zeros_like(A), _projected(state, "B", A, inverse_A, corrections, eps) / scale
    return _projected(state, "A", B.mT, inverse_B, corrections, eps).mT / scale, torch.zeros_like(B)


def _pseudo_inverse(A: Float[Tensor, "*n r in"]) -> Float[Tensor, "*n in r"]:
    """Aᵀ(AAᵀ)⁻¹."""
    f = thin_svd(A.mT)
    return (f.U * f.inverse[..., None, :]) @ f.V.mT


def _update(
    state: dict[str, Any],
    name: str,
    gradient: Float[Tensor, "*n out r"],
    A: Float[Tensor, "*n r in"],
    inverse: Float[Tensor, "*n in r"],
    betas: tuple[float, float],
) -> None:
    """One step of m and v in the coordinates of A; (AAᵀ)⁻¹ = inverseᵀ · inverse."""
    g = gradient @ (inverse.mT @ inverse)
    mean = state.setdefault(f"{name}_mean", torch.zeros_like(g))
    square = state.setdefault(f"{name}_square", torch.zeros_like(g[..., None] * g[..., None, :]))
    turn = state.get(f"{name}_basis", A) @ inverse
    over_rows = turn[..., None, :, :]
    state[f"{name}_basis"] = A.clone()
    state[f"{name}_mean"] = (mean @ turn).lerp_(g, 1 - betas[0])
    state[f"{name}_square"] = (over_rows.mT @ square @ over_rows).lerp_(g[..., None] * g[..., None, :], 1 - betas[1])


def _projected(
    state: dict[str, Any],
    name: str,
    A: Float[Tensor, "*n r in"],
    inverse: Float[Tensor, "*n in r"],
    corrections: tuple[float, float],
    eps: float,
) -> Float[Tensor, "*n out r"]:
    """N Aᵀ(AAᵀ)⁻¹, r² rows of N at a time, so that what is made is of the size of the products a_j a_jᵀ."""
    mean, square = state[f"{name}_mean"] / corrections[0], state[f"{name}_square"].flatten(-2) / corrections[1]
    products = (A[..., :, None, :] * A[..., None, :, :]).flatten(-3, -2)  # [*n, r², in]
    count = products.shape[-2]
    parts = [
        (m @ A / ((v @ products).clamp_min_(0.0).sqrt_() + eps)) @ inverse
        for m, v in zip(mean.split(count, -2), square.split(count, -2), strict=True)
    ]
    return torch.cat(parts, -2)


class Loft(PairOptimizer):
    """LoFT on typed pairs; ``lr`` is that of AdamW on the weights themselves.

    Args:
        pairs, others: as for :class:`~rankwise.optim.spectral.Spectral`.
        betas, eps: of the formulas above.
    """

    invariant: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    def __init__(
        self,
        pairs: Iterable[Pair],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
    ) -> None:
        check_betas(betas)
        check_number("eps", eps, above_zero=True)
        options = {"betas": tuple(betas), "eps": eps}
        super().__init__(pairs, direction, options, lr=lr, weight_decay=weight_decay, others=others)


LoftChoice = choice_of(Loft)
