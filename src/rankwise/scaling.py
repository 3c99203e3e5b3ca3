"""The scale s of ΔW = s·B A as a function of alpha and the rank. One class a method, one row in the table."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from rankwise.methods import Method


class Scaling(ABC):
    """A formula for s.

    Attributes:
        use_rslora: which of the two formulas that PEFT's files can declare a file has: α/√r, or else α/r. A saved
            adapter's alpha is the one with which the declared formula gives s, so a formula that no file knows is kept
            exactly too.
    """

    use_rslora: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, alpha: float, rank: int) -> float:
        """s for this alpha and rank."""


@dataclass(frozen=True)
class LoraScaling(Scaling):
    """α/r (Hu 2021, section 4.1)."""

    def __call__(self, alpha: float, rank: int) -> float:
        return alpha / rank


@dataclass(frozen=True)
class RsloraScaling(Scaling):
    """α/√r: the update's size no longer shrinks as the rank grows (Kalajdzievski 2023)."""

    use_rslora: ClassVar[bool] = True

    def __call__(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank)


SCALINGS: dict[str, Method] = {
    "lora": Method(".scaling:LoraScaling", "arXiv 2106.09685", "α/r"),
    "rslora": Method(".scaling:RsloraScaling", "arXiv 2312.03732", "α/√r: rank-stabilised"),
}


def declared(use_rslora: bool) -> Scaling:
    """The formula that a PEFT file with this flag declares."""
    return RsloraScaling() if use_rslora else LoraScaling()
