"""LoRA-Muon: Muon's step for each half of the pair, measured in W (arXiv 2606.12921).

With S_A = AAᵀ and S_B = BᵀB, and M_A, M_B the momenta of g_A = s BᵀG and g_B = s GAᵀ,

    dA = S_B^-½ msign(S_B^-½ M_A) / 2s,    dB = msign(M_B S_A^-½) S_A^-½ / 2s

dB is the steepest descent in B where a step is as long as the spectral norm of s dB A, what it does to W, and dA
likewise; each half takes half of the rate, so that a step of rate η moves W by at most η. Rotating or rescaling the
pair, A → TA and B → BT⁻¹, changes nothing in W. With B = 0 only B moves.

Roots are pseudo-inverses, from the SVDs of A and B and not from the Gram matrices, so that condition numbers are not
squared. Departs from the paper in the exact sign, in place of Newton–Schulz.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.algebra.msign import msign, thin_svd
from rankwise.optim.checks import check_beta
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
    beta: float = 0.8,
    unit: Float[Tensor, "*n"] | float = 1.0,
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """(dA, dB) of the formulas above.

    Args:
        A, B: the effective pair (start + δ), or a batch of pairs of equal shape.
        grad_A, grad_B: dL/dA = s BᵀG and dL/dB = s GAᵀ.
        scale: s.
        state: the pair's momenta; empty before the first step, updated in place.
        beta: of the momentum, with Nesterov's look-ahead.
        unit: the most, in spectral norm, that a step of rate 1 moves W, for each pair.
    """
    M_A = momentum(grad_A, state, "momentum_A", beta)
    M_B = momentum(grad_B, state, "momentum_B", beta)
    size = torch.as_tensor(unit, dtype=A.dtype, device=A.device)[..., None, None] / (2 * scale)
    return size * _half(M_A.mT, B).mT, size * _half(M_B, A.mT)


def _half(M: Float[Tensor, "*n m r"], other: Float[Tensor, "*n k r"]) -> Float[Tensor, "*n m r"]:
    """msign(M S^-½) S^-½ with S = otherᵀ other = V diag(σ²) Vᵀ. The left V of S^-½ leaves the sign."""
    f = thin_svd(other)
    root = f.V * f.inverse[..., None, :]
    return msign(M @ root) @ root.mT


class LoraMuon(PairOptimizer):
    """LoRA-Muon on typed pairs. ``lr`` bounds how far a step moves W, in spectral norm.

    Args:
        pairs, others: as for :class:`~rankwise.optim.spectral.Spectral`.
        beta: of the momentum.
    """

    invariant: ClassVar[bool] = True
    others_lr: ClassVar[float | None] = 2e-4

    def __init__(
        self,
        pairs: Iterable[Pair],
        lr: float = 0.1,
        beta: float = 0.8,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
    ) -> None:
        check_beta("beta", beta)
        options = {"beta": beta}
        super().__init__(pairs, direction, options, lr=lr, weight_decay=weight_decay, others=others)


LoraMuonChoice = choice_of(LoraMuon)
