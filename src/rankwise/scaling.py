"""The scale s of ΔW = s·B A as a function of alpha and the rank."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scaling:
    """One line of the table."""

    scale: Callable[[float, int], float]
    paper: str
    summary: str


def lora(alpha: float, rank: int) -> float:
    """α/r (Hu 2021, section 4.1)."""
    return alpha / rank


def rslora(alpha: float, rank: int) -> float:
    """α/√r: the update's size no longer shrinks as the rank grows (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank)


SCALINGS = {
    "lora": Scaling(lora, "arXiv 2106.09685", "α/r"),
    "rslora": Scaling(rslora, "arXiv 2312.03732", "α/√r: rank-stabilised"),
}
