"""What a spectrum of singular values says: how many directions a matrix really has."""

import torch
from torch import Tensor

from rankwise.errors import SpecError
from rankwise.shapes import Float


def effective_rank(singular_values: Float[Tensor, " k"]) -> float:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ, from 1 to k; 0 of a zero matrix (Roy & Vetterli 2007, EUSIPCO).

    >>> import torch
    >>> round(effective_rank(torch.ones(4)), 6)
    4.0
    """
    s = _checked(singular_values)
    if not bool(s.any()):
        return 0.0
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def stable_rank(singular_values: Float[Tensor, " k"]) -> float:
    """‖M‖²_F / ‖M‖²₂ = Σσ² / max σ², at most the rank; 0 of a zero matrix (Rudelson & Vershynin 2007).

    >>> import torch
    >>> stable_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    s = _checked(singular_values)
    return float((s / s.max()).square().sum()) if bool(s.any()) else 0.0


def energy_captured(singular_values: Float[Tensor, " k"], total: float | None = None) -> Float[Tensor, " k"]:
    """Share of ‖M‖²_F that the first 1, 2, … directions hold: Σ_{i≤j} σᵢ² / ‖M‖²_F.

    Args:
        total: ‖M‖²_F, where the values are not all there are; by default Σσ².

    >>> import torch
    >>> energy_captured(torch.tensor([3.0, 4.0]))
    tensor([0.6400, 1.0000], dtype=torch.float64)
    """
    squares = _checked(singular_values).square().sort(descending=True).values
    energy = float(squares.sum()) if total is None else total
    shares: Tensor = squares.cumsum(0) / energy if energy else torch.zeros_like(squares)
    return shares


def _checked(singular_values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    s = singular_values.detach().double().cpu()
    if not len(s) or bool((s < 0).any()) or not bool(torch.isfinite(s).all()):
        raise SpecError(f"expected finite singular values ≥ 0, at least one, found {singular_values.tolist()[:8]}")
    return s
