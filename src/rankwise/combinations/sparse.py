"""TIES and DARE: entries of each change are set to zero before the changes are joined.

Both papers mean the entries of ΔW, not those of A and B, so the result is dense: one matrix [out, in] of one site at a
time, made by blocks of its rows. A LoRA holds it in part only, and the error says which part. What is kept of a change
is decided at each site apart, as mergekit and PEFT do it, where TIES' paper ranks the entries of all weights together.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from rankwise.approximation import Change, dense_rows, row_blocks
from rankwise.combinations.base import Combination, check_density
from rankwise.shapes import Float


class _Entrywise(Combination):
    """A method that works on the entries of ΔW: on rows of all changes at once."""

    truncation: ClassVar[Literal["none", "needed", "optional"]] = "needed"

    def __call__(self, changes: Sequence[Change], generator: Generator) -> Change:
        limits = self.limits(changes)
        shape = tuple(changes[0].shape)
        parts = []
        for rows in row_blocks(shape):
            stacked = torch.stack([dense_rows(change, rows) for change in changes])
            parts.append(self.joined(stacked, limits, generator))
        return torch.cat(parts)

    def limits(self, changes: Sequence[Change]) -> list[float]:
        """What each change's entries are measured against, where the method measures them."""
        return []

    @abstractmethod
    def joined(self, stacked: Float[Tensor, "n rows in"], limits: list[float], generator: Generator) -> Tensor:
        """Rows of the result [rows, in] from the same rows of all changes."""


@dataclass(frozen=True)
class Ties(_Entrywise):
    """Trim, elect a sign, take the mean of what agrees with it (Yadav 2023, algorithm 1).

    The sign of an entry is that of the sum of the trimmed, weighted changes.

    Attributes:
        density: share of each change's entries that is kept, the largest; the paper's k = 20 %.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        check_density("ties", self.density)

    def limits(self, changes: Sequence[Change]) -> list[float]:
        return [smallest_kept(dense_rows(change, slice(None)), self.density) for change in changes]

    def joined(self, stacked: Float[Tensor, "n rows in"], limits: list[float], generator: Generator) -> Tensor:
        return mean_of_agreeing(trimmed(stacked, limits))


@dataclass(frozen=True)
class Dare(_Entrywise):
    """Drop And REscale (Yu 2024): Σ wᵢ ΔWᵢ ⊙ mᵢ / density, the entries of mᵢ 1 with that probability, else 0.

    Attributes:
        density: 1 − p, p the paper's drop rate.
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density("dare", self.density)

    def joined(self, stacked: Float[Tensor, "n rows in"], limits: list[float], generator: Generator) -> Tensor:
        return self._dropped(stacked, generator).sum(0)

    def _dropped(self, stacked: Tensor, generator: Generator) -> Tensor:
        kept = torch.rand(stacked.shape, generator=generator) < self.density
        return stacked * kept / self.density


@dataclass(frozen=True)
class DareTies(Dare):
    """DARE's random trimming, then TIES' election of signs and mean."""

    def joined(self, stacked: Float[Tensor, "n rows in"], limits: list[float], generator: Generator) -> Tensor:
        return mean_of_agreeing(self._dropped(stacked, generator))


def smallest_kept(matrix: Float[Tensor, "out in"], density: float) -> float:
    """The absolute value of the smallest of the ``density`` largest entries."""
    sizes = matrix.abs().flatten()
    kept = max(int(density * sizes.numel()), 1)
    return float(sizes.kthvalue(sizes.numel() - kept + 1).values)


def trimmed(stacked: Float[Tensor, "n rows in"], limits: Sequence[float]) -> Float[Tensor, "n rows in"]:
    """Each change with the entries below its limit set to zero."""
    least = torch.tensor(limits, dtype=stacked.dtype)[:, None, None]
    return stacked * (stacked.abs() >= least)


def mean_of_agreeing(stacked: Float[Tensor, "n rows in"]) -> Float[Tensor, "rows in"]:
    """Entry by entry, the mean of the non-zero ones that have the sign of the sum."""
    agree = (stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)).to(stacked.dtype)
    mean: Tensor = (stacked * agree).sum(0) / agree.sum(0).clamp_min(1.0)
    return mean
