"""What an initialisation is given and what it returns."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from rankwise.errors import SpecError
from rankwise.shapes import Float
from rankwise.sites import Site, Start

EvidenceNeed = Literal["nothing", "gradients", "activations"]


@runtime_checkable
class GradientEvidence(Protocol):
    """The gradient of one site's weight, exact or sketched."""

    @property
    def energy(self) -> float:
        """‖G‖²_F."""

    def svd(self, k: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
        """The k leading singular triplets: U [out, k], S [k] descending, V [in, k]."""


def embedding_start(weight: Float[Tensor, "dim vocab"], site: Site, generator: Generator) -> Start:
    """A = 0, B ~ N(0, 1): an embedding's input is one-hot, so the roles of A and B turn (the field's convention)."""
    dim, vocab = site.shape
    B = torch.randn(dim, site.rank, generator=generator)
    return Start(weight.new_zeros(site.rank, vocab), B.to(weight))


class Init(ABC):
    """An initialisation: frozen dataclass fields are its options, calling it makes one site's start.

    Attributes:
        needs: what it must have seen of the training data.
    """

    needs: ClassVar[EvidenceNeed] = "nothing"

    @abstractmethod
    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: Any, generator: Generator) -> Start:
        """The start pair of one site.

        Args:
            weight: W₀ as one matrix, dequantised, in fp32 or finer.
            site: its name, kind, rank and scale.
            evidence: what ``needs`` names, for this site (gradient evidence answers ``svd(k)``); else None.
            generator: derived from (seed, site name), so the result depends on nothing else.
        """

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """The largest rank that this start can fill for a matrix [out, in]."""
        return min(shape)

    def check(self, site: Site) -> None:
        """Refuse a site that this start cannot serve.

        Raises:
            SpecError: the rank is larger than :meth:`largest_rank`.
        """
        limit = self.largest_rank(site.shape)
        if site.rank > limit:
            out, into = site.shape
            raise SpecError(
                f"{site.name}: rank {site.rank} with init {type(self).__name__} needs a matrix of at least "
                f"{site.rank * min(site.shape) // max(limit, 1)} rows and columns, found {out} × {into}; "
                f"use rank ≤ {limit}, exclude the module, or give it a smaller rank in rank_pattern"
            )
