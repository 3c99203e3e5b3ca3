"""Joint spectral step: of all moves that the pair can make together, the one of even size that follows the gradient.

The pair's first-order moves s(B δA + δB A) are the tangent space of the matrices of rank r at BA. With Aᵀ = Q_A R_A
and B = Q_B R_B the gradient's projection on it is, from g_A = s BᵀG and g_B = s GAᵀ alone,

    Q_BᵀG = R_B⁺ᵀ g_A / s,    G Q_A = g_B R_A⁺ / s
    P = Q_B (Q_BᵀG) + (I − Q_B Q_Bᵀ)(G Q_A) Q_Aᵀ        [out, in], of rank ≤ 2r

It is LoRA-Pro's equivalent gradient. Its matrix sign is Muon's step. What of that leaves the tangent space is taken
away, and the rest brought back to norm 1 (it has at most 2/√3):

    D = T / ‖T‖₂,    T = S − (I − Q_B Q_Bᵀ) S (I − Q_A Q_Aᵀ),    S = msign(P)
    dA = R_B⁺ (Q_BᵀD) / s,    dB = (I − Q_B Q_Bᵀ) D Q_A R_A⁺ᵀ / s

To first order a step of rate η moves W by exactly η in spectral norm, whatever r, alpha, s, or the balance of A and B.
Rotating or rescaling the pair, A → TA and B → BT⁻¹, changes nothing in W. With B = 0 only B moves.

P is never formed: it is [Q_B Q_Z] core [Q_A Q_Y]ᵀ with a core of 2r × 2r, and the sign is the core's. All
pseudo-inverses come from SVDs of A and B, so that a half that is zero or has lost rank spans what it spans.

After Muon (Jordan 2024), in the tangent space as in Riemannion (arXiv 2507.12142), which retracts to rank r after the
step; here the pair itself moves, and its product gains the second-order term s δB δA.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankwise.algebra.msign import ThinSVD, msign, spectral_norm, thin_svd
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
    """(dA, dB) of the formulas above, from the momenta of the two gradients.

    Args:
        A, B: the effective pair (start + δ), or a batch of pairs of equal shape.
        grad_A, grad_B: dL/dA = s BᵀG and dL/dB = s GAᵀ.
        scale: s.
        state: the pair's momenta; empty before the first step, updated in place.
        beta: of the momentum, with Nesterov's look-ahead.
        unit: the spectral norm of a step of rate 1, for each pair.
    """
    M_A = momentum(grad_A, state, "momentum_A", beta)
    M_B = momentum(grad_B, state, "momentum_B", beta)
    dA, dB = tangent_sign(thin_svd(A.mT), thin_svd(B), M_A, M_B)
    size = torch.as_tensor(unit, dtype=A.dtype, device=A.device)[..., None, None] / scale
    return size * dA, size * dB


def tangent_sign(
    a: ThinSVD, b: ThinSVD, M_A: Float[Tensor, "*n r in"], M_B: Float[Tensor, "*n out r"]
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """(R_B⁺ Q_BᵀD, (I − Q_B Q_Bᵀ) D Q_A R_A⁺ᵀ) / ‖D‖₂ with the triangles R = diag(S) Vᵀ; zero where D is."""
    rows = M_A.mT @ b.V * b.inverse[..., None, :]  # (Q_BᵀG)ᵀ, but for 1/s, which the sign does not see
    columns = M_B @ a.V * a.inverse[..., None, :]  # G Q_A
    inside = rows.mT @ a.U
    Q_Y, R_Y = torch.linalg.qr(rows - a.U @ inside.mT)
    Q_Z, R_Z = torch.linalg.qr(columns - b.U @ (b.U.mT @ columns))
    core = torch.cat([torch.cat([inside, R_Y.mT], -1), pad(R_Z, (0, R_Y.shape[-2]))], -2)
    k_B, k_A = inside.shape[-2:]
    D = msign(core)
    D[..., k_B:, k_A:] = 0.0  # what the pair cannot move to first order
    norm = spectral_norm(D)[..., None, None]
    D = D / torch.where(norm > 0, norm, 1.0)
    V = D[..., :k_B, :k_A] @ a.U.mT + D[..., :k_B, k_A:] @ Q_Y.mT
    U = Q_Z @ D[..., k_B:, :k_A]
    return (b.V * b.inverse[..., None, :]) @ V, U @ (a.V * a.inverse[..., None, :]).mT


class Spectral(PairOptimizer):
    """The joint spectral step on typed pairs. ``lr`` is a distance in W, the same for every rank, alpha and scale.

    Args:
        pairs: from :func:`rankwise.pairs`.
        lr: η of the formulas above. A step has a fixed length, so let it fall to zero over a run.
        beta: of the momentum.
        others: trained tensors that are in no pair, which get AdamW at ``others_lr`` unless their group brings a rate.

    >>> import torch, rankwise as rw
    >>> model = rw.attach(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)), rw.LoRA(rank=2))
    >>> optimizer = Spectral(rw.pairs(model), lr=0.03)
    >>> model(torch.randn(5, 8)).square().mean().backward()
    >>> optimizer.step()
    """

    invariant: ClassVar[bool] = True
    others_lr: ClassVar[float | None] = 2e-4

    def __init__(
        self,
        pairs: Iterable[Pair],
        lr: float = 0.03,
        beta: float = 0.8,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
    ) -> None:
        check_beta("beta", beta)
        options = {"beta": beta}
        super().__init__(pairs, direction, options, lr=lr, weight_decay=weight_decay, others=others)


SpectralChoice = choice_of(Spectral)
