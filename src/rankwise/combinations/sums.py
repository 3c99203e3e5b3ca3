"""Weighted sums of the changes themselves, ΔW = Σ wᵢΔWᵢ.

Not of the factors: PEFT's "linear" adds the Aᵢ and the Bᵢ apart, and so adds every ΔWᵢ's B to every other one's A.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, Literal

import torch
from torch import Generator

from rankwise.algebra.low_rank import LowRank
from rankwise.approximation import Change, dense_rows, row_blocks
from rankwise.combinations.base import Combination


@dataclass(frozen=True)
class TaskArithmetic(Combination):
    """Σ wᵢΔWᵢ (Ilharco 2023): by factors, of rank Σ rᵢ, where all changes have them."""

    def __call__(self, changes: Sequence[Change], generator: Generator) -> Change:
        return total(changes)


@dataclass(frozen=True)
class Exact(TaskArithmetic):
    """The sum, whole."""

    truncation: ClassVar[Literal["none", "needed", "optional"]] = "none"


@dataclass(frozen=True)
class Svd(TaskArithmetic):
    """The nearest change of a rank to the sum."""

    truncation: ClassVar[Literal["none", "needed", "optional"]] = "needed"


def total(changes: Sequence[Change]) -> Change:
    """The sum, by factors where all have them."""
    factors = [change for change in changes if isinstance(change, LowRank)]
    if len(factors) == len(changes):
        return reduce(add, factors)
    shape = tuple(changes[0].shape)
    dtype = reduce(torch.promote_types, (dense_rows(change, slice(0, 1)).dtype for change in changes))
    summed = torch.zeros(shape, dtype=dtype)
    for rows in row_blocks(shape):
        for change in changes:
            summed[rows] += dense_rows(change, rows)
    return summed
