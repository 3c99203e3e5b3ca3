"""LoRA-GA: start from the gradient's singular vectors, so that the first step is full fine-tuning's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from rankwise.errors import SpecError
from rankwise.inits.base import EvidenceNeed, GradientEvidence, Init
from rankwise.lowrank import truncated_svd
from rankwise.shapes import Float
from rankwise.sites import Site, Start

Split = tuple[Tensor, Tensor]  # which of the 2r singular directions go to A (input side) and to B (output side)


def _random_split(rank: int, generator: Generator) -> Split:
    """A disjoint random half each."""
    shuffled = torch.randperm(2 * rank, generator=generator)
    return shuffled[:rank], shuffled[rank:]


DIRECTIONS: dict[str, Callable[[int, Generator], Split]] = {
    "ArB2r": lambda r, _: (torch.arange(r), torch.arange(r, 2 * r)),
    "A2rBr": lambda r, _: (torch.arange(r, 2 * r), torch.arange(r)),
    "ArBr": lambda r, _: (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
    "random": _random_split,
}


@dataclass(frozen=True)
class LoraGA(Init):
    """A₀ = c·V[:, i_A]ᵀ, B₀ = c·U[:, i_B] from the gradient's SVD G = U S Vᵀ (Wang 2024, arXiv 2407.05000).

    One SGD step moves W by −η s²(BBᵀG + GAᵀA); with the 2r leading directions split over A and B this is s²c² times
    the best rank-2r approximation of full fine-tuning's step −ηG (Eckart–Young). Only G's directions count, so
    scaling the loss changes nothing.

    Attributes:
        directions: how the 2r directions are split: "ArB2r" (the article's), "A2rBr", "ArBr" (alternating), "random".
        scale: c. "stable": out^¼/√γ, for use with rsLoRA's s; "gd": 1/s, the step then equals the rank-2r projection
            of the full one; "unit": 1; "weight": the mean of √(σ/s) over W's r largest singular values σ.
        gamma: γ of "stable".
        align: which optimizer's first step is to agree: "sgd" uses G itself.
    """

    directions: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "gd", "unit", "weight"] = "stable"
    gamma: float = 16.0
    align: Literal["sgd"] = "sgd"

    needs: ClassVar[EvidenceNeed] = "gradients"

    def __post_init__(self) -> None:
        _one_of("directions", self.directions, DIRECTIONS)
        _one_of("scale", self.scale, SCALES)
        _one_of("align", self.align, ("sgd",))
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise SpecError(f"init 'lora-ga': gamma must be a positive number, found {self.gamma!r}")

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """min(out, in) // 2: A and B take r directions each."""
        return min(shape) // 2

    def __call__(
        self, weight: Float[Tensor, "out in"], site: Site, evidence: GradientEvidence, generator: Generator
    ) -> Start:
        u, _, v = evidence.svd(2 * site.rank)
        for_A, for_B = DIRECTIONS[self.directions](site.rank, generator)
        c = SCALES[self.scale](self, weight, site, generator)
        return Start(c * v[:, for_A].T.to(weight), c * u[:, for_B].to(weight))


def _one_of(field: str, value: str, known: object) -> None:
    names = list(known)  # type: ignore[call-overload]
    if value not in names:
        raise SpecError(f"init 'lora-ga': {field} must be one of {', '.join(names)}, found {value!r}")


def _stable(init: LoraGA, weight: Tensor, site: Site, generator: Generator) -> float:
    return float(site.shape[0] ** 0.25 / init.gamma**0.5)


def _gd(init: LoraGA, weight: Tensor, site: Site, generator: Generator) -> float:
    return 1.0 / site.scale


def _unit(init: LoraGA, weight: Tensor, site: Site, generator: Generator) -> float:
    return 1.0


def _weight(init: LoraGA, weight: Tensor, site: Site, generator: Generator) -> float:
    singular_values = truncated_svd(weight, site.rank, generator)[1]
    return float((singular_values / site.scale).sqrt().mean())


SCALES: dict[str, Callable[[LoraGA, Tensor, Site, Generator], float]] = {
    "stable": _stable,
    "gd": _gd,
    "unit": _unit,
    "weight": _weight,
}
