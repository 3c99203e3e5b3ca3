"""Start pairs whose first Adam step is as close as can be to full fine-tuning's.

Adam's first step is −η sign(gradient), so the pair moves W by −ηs·D with D = B sign(BᵀG) + sign(GAᵀ)A, where full
fine-tuning moves it by −η sign(G). The source article poses min ‖D − sign(G)‖²_F and leaves it open (there is no
closed form). With the overall scale free this is to maximise the cosine between D and sign(G), which is done here by
gradient ascent on a smoothed sign that hardens as it goes, from several starts at once.

Shapes: n layers of equal shape, c candidate pairs each. B is held transposed, [n, c, r, out], so that both halves of
all candidates of a layer meet its G in one product with c·r rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.shapes import Float

Sign = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Aligned:
    """The best pair of each layer.

    Attributes:
        A [n, r, in], B [n, out, r].
        before: [n], the largest cosine among the given starts.
        after: [n], this pair's; never smaller than ``before``.
    """

    A: Float[Tensor, "n r in"]
    B: Float[Tensor, "n out r"]
    before: Float[Tensor, " n"]
    after: Float[Tensor, " n"]


def align_with_adam(
    A: Float[Tensor, "n c r in"],
    B: Float[Tensor, "n c out r"],
    G: Float[Tensor, "n out in"],
    *,
    iterations: int = 60,
    rate: float = 0.5,
    temperatures: tuple[float, float] = (0.5, 0.01),
) -> Aligned:
    """Raise the cosine from every candidate start, keep each layer's best of starts and results.

    Args:
        rate: of the ascent (itself by Adam, cosine decay), in units of an entry's root mean square.
        temperatures: of the smoothed sign, at the start and at the end.
    """
    G = G / torch.linalg.matrix_norm(G, keepdim=True).clamp_min(1e-30)
    target = torch.sign(G)
    start_A, start_B = _unit_entries(A), _unit_entries(B.mT)
    end_A, end_B = _ascend(start_A, start_B, G, target, iterations, rate, temperatures)
    before = _cosine(A, B.mT, G, target, torch.sign)
    candidates_A, candidates_B = torch.cat([A, end_A], 1), torch.cat([B.mT, end_B], 1)
    after, winner = torch.cat([before, _cosine(end_A, end_B, G, target, torch.sign)], 1).max(1)
    layers = torch.arange(len(winner), device=winner.device)
    return Aligned(candidates_A[layers, winner], candidates_B[layers, winner].mT, before.max(1).values, after)


def compare_with_adam(
    A: Float[Tensor, "n r in"], B: Float[Tensor, "n out r"], G: Float[Tensor, "n out in"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """cos(D, sign G) and the factor c that brings c·D nearest to sign G, ⟨D, sign G⟩ / ‖D‖²; each [n]."""
    target = torch.sign(G)
    overlap, size = _products(A[:, None], B.mT[:, None], G, target, torch.sign)
    norm = torch.linalg.matrix_norm(target).clamp_min(1e-30)
    return overlap[:, 0] / (size[:, 0].sqrt() * norm), overlap[:, 0] / size[:, 0]


def _ascend(
    A: Tensor, B: Tensor, G: Tensor, target: Tensor, iterations: int, rate: float, temperatures: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    ascent = torch.optim.Adam([A, B], betas=(0.9, 0.95), maximize=True)
    hot, cold = temperatures
    for step in range(iterations):
        progress = step / max(iterations - 1, 1)
        ascent.param_groups[0]["lr"] = rate * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        with torch.enable_grad():
            cosine = _cosine(A, B, G, target, _soft_sign(hot * (cold / hot) ** progress))
            A.grad, B.grad = torch.autograd.grad(cosine.sum(), (A, B))  # candidates do not interact
        ascent.step()
    return A.detach(), B.detach()


def _cosine(A: Tensor, B: Tensor, G: Tensor, target: Tensor, sign: Sign) -> Float[Tensor, "n c"]:
    """cos(D, target) of every candidate."""
    overlap, size = _products(A, B, G, target, sign)
    norm: Tensor = torch.linalg.matrix_norm(target).clamp_min(1e-30)[:, None]
    return overlap / (size.sqrt() * norm)


def _products(
    A: Float[Tensor, "n c r in"],
    B: Float[Tensor, "n c r out"],
    G: Float[Tensor, "n out in"],
    target: Float[Tensor, "n out in"],
    sign: Sign,
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """⟨D, target⟩ and ‖D‖² of D = B sign(BᵀG) + sign(GAᵀ)A, from r × r products: D is never formed."""
    P = sign(B.flatten(1, 2) @ G)  # [n, c·r, in]: rows of sign(BᵀG)
    Q = sign(A.flatten(1, 2) @ G.mT)  # [n, c·r, out]: columns of sign(GAᵀ)
    towards_B, towards_A = (P @ target.mT).view_as(B), (Q @ target).view_as(A)
    overlap = (B * towards_B).sum((-2, -1)) + (A * towards_A).sum((-2, -1))
    P, Q = P.view_as(A), Q.view_as(B)
    size = (B @ B.mT) * (P @ P.mT) + (Q @ Q.mT) * (A @ A.mT) + 2 * (B @ Q.mT) * (P @ A.mT)
    return overlap, size.sum((-2, -1)).clamp_min(1e-30)


def _soft_sign(temperature: float) -> Sign:
    """tanh(z / (τ·rms z)) a row: smooth, and blind to the row's scale as the sign is."""

    def sign(z: Tensor) -> Tensor:
        rms: Tensor = z.detach().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        soft: Tensor = torch.tanh(z / (temperature * rms))
        return soft

    return sign


def _unit_entries(factor: Tensor) -> Tensor:
    return factor / factor.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-30)
