"""LoRA-GA: start from the gradient's singular vectors, so that the first step is full fine-tuning's."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from rankwise.algebra.svd import truncated_svd
from rankwise.errors import EvidenceError, SpecError
from rankwise.inits.adam_alignment import align_with_adam, compare_with_adam
from rankwise.inits.base import EvidenceNeed, ExactEvidence, GradientEvidence, Init
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


@dataclass(frozen=True, eq=False)
class UnitPair:
    """A pair before the scale c is chosen.

    Attributes:
        full_size: the c for which the first step is the full one's projection on it, in size too.
        notes: figures about how the pair was found.
    """

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    full_size: float
    notes: Mapping[str, float]


@dataclass(frozen=True)
class LoraGA(Init):
    """A₀ = c·V[:, i_A]ᵀ, B₀ = c·U[:, i_B] from the gradient's SVD G = U S Vᵀ (Wang 2024, arXiv 2407.05000).

    One SGD step moves W by −η s²(BBᵀG + GAᵀA); with the 2r leading directions split over A and B this is s²c² times
    the best rank-2r approximation of full fine-tuning's step −ηG (Eckart–Young). Only G's directions count, so
    scaling the loss changes nothing.

    Adam's first step is −η sign(G) instead, and the pair's −ηs(B sign(BᵀG) + sign(GAᵀ)A); the article leaves the best
    pair for it open and names three answers, which ``align`` chooses from.

    Attributes:
        directions: how the 2r directions are split: "ArB2r" (the article's), "A2rBr", "ArBr" (alternating), "random".
        scale: c. "stable": out^¼/√γ, for use with rsLoRA's s; "gd": the first step then equals the full one's
            projection on it, in size too (1/s for align="sgd"); "unit": 1; "weight": the mean of √(σ/s) over W's r
            largest singular values σ.
        gamma: γ of "stable".
        align: which optimizer's first step is to agree. "sgd": the SVD of G. "sign": that of sign(G). "adam": the
            article's objective itself, minimised from both (:mod:`rankwise.inits.adam_alignment`); wants exact
            gradients, a second a layer, and notes the cosine it started from and reached.
    """

    directions: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "gd", "unit", "weight"] = "stable"
    gamma: float = 16.0
    align: Literal["sgd", "sign", "adam"] = "sgd"

    needs: ClassVar[EvidenceNeed] = "gradients"

    def __post_init__(self) -> None:
        _one_of("directions", self.directions, DIRECTIONS)
        _one_of("scale", self.scale, SCALES)
        _one_of("align", self.align, ALIGNMENTS)
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise SpecError(f"init 'lora-ga': gamma must be a positive number, found {self.gamma!r}")

    @property
    def needs_whole_gradient(self) -> bool:
        """The sign of a sketch is not a sketch of the sign."""
        return self.align != "sgd"

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """min(out, in) // 2: A and B take r directions each."""
        return min(shape) // 2

    def __call__(
        self, weight: Float[Tensor, "out in"], site: Site, evidence: GradientEvidence, generator: Generator
    ) -> Start:
        ((_, start),) = self.starts([site], lambda _: weight, {site.name: evidence}, {site.name: generator})
        return start

    def starts(
        self,
        sites: Sequence[Site],
        weight_of: Callable[[Site], Float[Tensor, "out in"]],
        evidence: Mapping[str, GradientEvidence],
        generators: Mapping[str, Generator],
    ) -> Iterator[tuple[Site, Start]]:
        """Sites of one shape and rank together where the alignment takes several."""
        for group in _alike(sites, evidence):
            splits = [DIRECTIONS[self.directions](site.rank, generators[site.name]) for site in group]
            pairs = ALIGNMENTS[self.align]([evidence[site.name] for site in group], group, splits)
            for site, pair in zip(group, pairs, strict=True):
                weight = weight_of(site)
                c = SCALES[self.scale](self, pair, weight, site, generators[site.name])
                yield site, Start((c * pair.A).to(weight), (c * pair.B).to(weight), notes=pair.notes)


_TOGETHER = 2**26  # numbers of gradients that an accelerator works on at a time


def _alike(sites: Sequence[Site], evidence: Mapping[str, GradientEvidence]) -> Iterator[list[Site]]:
    """Groups of sites of one shape and rank. On a CPU each is alone: one gradient fits its cache, several do not."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        gradient = evidence[site.name]
        accelerated = isinstance(gradient, ExactEvidence) and gradient.matrix.device.type != "cpu"
        groups.setdefault((site.shape, site.rank) if accelerated else (site.name,), []).append(site)
    for group in groups.values():
        size = max(_TOGETHER // math.prod(group[0].shape), 1)
        yield from (group[first : first + size] for first in range(0, len(group), size))


def _one_of(field: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise SpecError(f"init 'lora-ga': {field} must be one of {', '.join(known)}, found {value!r}")


Evidence = Sequence[GradientEvidence]  # of several sites of one shape and rank


def _for_sgd(evidence: Evidence, sites: Sequence[Site], splits: Sequence[Split]) -> list[UnitPair]:
    pairs = []
    for gradient, site, split in zip(evidence, sites, splits, strict=True):
        A, B = _take(gradient.svd(2 * site.rank), split)
        pairs.append(UnitPair(A, B, 1.0 / site.scale, {}))
    return pairs


def _for_sign(evidence: Evidence, sites: Sequence[Site], splits: Sequence[Split]) -> list[UnitPair]:
    pairs = []
    for gradient, site, split in zip(evidence, sites, splits, strict=True):
        G = _exact(gradient, site)
        A, B = _sign_directions(G, site, split)
        before, full_size = compare_with_adam(A[None], B[None], G[None])
        pairs.append(UnitPair(A, B, float(full_size) / site.scale, {"adam_cosine": float(before)}))
    return pairs


def _for_adam(evidence: Evidence, sites: Sequence[Site], splits: Sequence[Split]) -> list[UnitPair]:
    G = torch.stack([_exact(gradient, site) for gradient, site in zip(evidence, sites, strict=True)])
    starts = [
        [_take(gradient.svd(2 * site.rank), split), _sign_directions(matrix, site, split)]
        for gradient, matrix, site, split in zip(evidence, G, sites, splits, strict=True)
    ]
    candidates_A, candidates_B = (torch.stack([torch.stack([s[i] for s in both]) for both in starts]) for i in (0, 1))
    aligned = align_with_adam(candidates_A, candidates_B, G)
    # Only the ratio of A's size to B's matters to the cosine: give the two together the size of 2r unit vectors.
    sizes = aligned.A.square().sum((1, 2)) + aligned.B.square().sum((1, 2))
    units = (2 * sites[0].rank / sizes).sqrt()[:, None, None]
    A, B = units * aligned.A, units * aligned.B
    _, full_sizes = compare_with_adam(A, B, G)
    return [
        UnitPair(
            A[i],
            B[i],
            float(full_sizes[i]) / site.scale,
            {"adam_cosine_at_start": float(aligned.before[i]), "adam_cosine": float(aligned.after[i])},
        )
        for i, site in enumerate(sites)
    ]


def _take(svd: tuple[Tensor, Tensor, Tensor], split: Split) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] from the leading singular vectors."""
    (u, _, v), (for_A, for_B) = svd, split
    return v[:, for_A].T, u[:, for_B]


def _sign_directions(G: Tensor, site: Site, split: Split) -> tuple[Tensor, Tensor]:
    return _take(truncated_svd(torch.sign(G), 2 * site.rank, torch.Generator().manual_seed(0)), split)


def _exact(evidence: GradientEvidence, site: Site) -> Tensor:
    """G itself."""
    if not isinstance(evidence, ExactEvidence):
        raise EvidenceError(
            f"{site.name}: align='sign' and align='adam' need the exact gradient, found a "
            f"{type(evidence).__name__}; collect with method='exact', or use align='sgd'"
        )
    return evidence.matrix


ALIGNMENTS: dict[str, Callable[[Evidence, Sequence[Site], Sequence[Split]], list[UnitPair]]] = {
    "sgd": _for_sgd,
    "sign": _for_sign,
    "adam": _for_adam,
}


def _stable(init: LoraGA, pair: UnitPair, weight: Tensor, site: Site, generator: Generator) -> float:
    return float(site.shape[0] ** 0.25 / init.gamma**0.5)


def _gd(init: LoraGA, pair: UnitPair, weight: Tensor, site: Site, generator: Generator) -> float:
    return pair.full_size


def _unit(init: LoraGA, pair: UnitPair, weight: Tensor, site: Site, generator: Generator) -> float:
    return 1.0


def _weight(init: LoraGA, pair: UnitPair, weight: Tensor, site: Site, generator: Generator) -> float:
    singular_values = truncated_svd(weight, site.rank, generator)[1]
    return float((singular_values / site.scale).sqrt().mean())


SCALES: dict[str, Callable[[LoraGA, UnitPair, Tensor, Site, Generator], float]] = {
    "stable": _stable,
    "gd": _gd,
    "unit": _unit,
    "weight": _weight,
}
