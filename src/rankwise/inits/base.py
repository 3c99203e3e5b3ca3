"""What an initialisation is given and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from rankwise.errors import SpecError
from rankwise.shapes import Float
from rankwise.sites import Site, Start

EvidenceNeed = Literal["nothing", "gradients", "activations", "covariance", "weights"]


@runtime_checkable
class GradientEvidence(Protocol):
    """The gradient of one site's weight, exact or sketched."""

    @property
    def energy(self) -> float:
        """‖G‖²_F."""

    def svd(self, k: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
        """The k leading singular triplets: U [out, k], S [k] descending, V [in, k]."""


@runtime_checkable
class ActivationEvidence(Protocol):
    """The leading directions of one site's input activations."""

    @property
    def components(self) -> Float[Tensor, "k in"]:
        """Orthonormal rows, the strongest first."""

    @property
    def explained(self) -> Float[Tensor, " k"]:
        """Share of the inputs' variance along each."""


@runtime_checkable
class CovarianceEvidence(Protocol):
    """The second moment of one site's input activations."""

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """C = Σ x xᵀ / n."""


# What evidence of each kind must be.
EVIDENCE: dict[EvidenceNeed, type[Any]] = {
    "nothing": object,
    "gradients": GradientEvidence,
    "activations": ActivationEvidence,
    "covariance": CovarianceEvidence,
    "weights": Tensor,
}

Triplets = tuple[Float[Tensor, "out r"], Float[Tensor, " r"], Float[Tensor, "in r"]]


def balanced_start(triplets: Triplets, scale: float, *, cancel: bool = True) -> Start:
    """The pair with s·B₀A₀ = U diag(S) Vᵀ and the singular values split evenly: B₀ = U√(S/s), A₀ = √(S/s)Vᵀ.

    Args:
        triplets: U [out, r], S [r] ≥ 0, V [in, r]: which matrix's directions, and which of them.
        scale: s.
        cancel: see :class:`rankwise.sites.Start`.
    """
    u, s, v = triplets
    root = (s / scale).sqrt()
    return Start((v * root).T, u * root, cancel)


@runtime_checkable
class ExactEvidence(GradientEvidence, Protocol):
    """Gradient evidence that still holds the whole matrix."""

    @property
    def matrix(self) -> Float[Tensor, "out in"]:
        """G."""


def embedding_start(weight: Float[Tensor, "dim vocab"], site: Site, generator: Generator) -> Start:
    """A = 0, B ~ N(0, 1): an embedding's input is one-hot, so the roles of A and B turn (the field's convention)."""
    dim, vocab = site.shape
    B = torch.randn(dim, site.rank, generator=generator)
    return Start(weight.new_zeros(site.rank, vocab), B.to(weight))


class Init(ABC):
    """An initialisation: frozen dataclass fields are its options, calling it makes one site's start.

    Attributes:
        needs: what it must have seen: of the training data ("gradients", "activations", their "covariance"), or the
            original "weights" of a quantised base.
        reference: a file that the original weights can be read from, where ``needs`` is "weights".
        keeps_function: whether the model's function at the start is the base's. Where it is not, changing it is what
            the method is for, and ``Start.cancel`` is False.
    """

    needs: ClassVar[EvidenceNeed] = "nothing"
    reference: str | None = None
    keeps_function: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: Any, generator: Generator) -> Start:
        """The start pair of one site.

        Args:
            weight: W₀ as one matrix, dequantised, in fp32 or finer.
            site: its name, kind, rank and scale.
            evidence: what ``needs`` names, for this site: :class:`GradientEvidence`, :class:`ActivationEvidence`,
                :class:`CovarianceEvidence`, or the original weight [out, in]; else None.
            generator: derived from (seed, site name), so the result depends on nothing else.
        """

    def starts(
        self,
        sites: Sequence[Site],
        weight_of: Callable[[Site], Float[Tensor, "out in"]],
        evidence: Mapping[str, Any],
        generators: Mapping[str, Generator],
    ) -> Iterator[tuple[Site, Start]]:
        """The starts of several sites, in any order; one by one unless the method gains from taking some together.

        Args:
            weight_of: makes a site's W₀, which may be a copy: it is not held on to.
            evidence, generators: by site name, for each what :meth:`__call__` takes.
        """
        for site in sites:
            yield site, self(weight_of(site), site, evidence[site.name], generators[site.name])

    @property
    def needs_whole_gradient(self) -> bool:
        """Whether gradient evidence must be G itself; a sketch of its leading directions will not do then."""
        return False

    def evidence_rank(self, site: Site) -> int:
        """How many directions of the evidence this start wants to choose from at a site."""
        return site.rank

    def ranks(self, sites: Sequence[Site], evidence: Mapping[str, Any]) -> Mapping[str, int]:
        """Site name → rank, now that the evidence is there; as planned unless the method redistributes them."""
        return {site.name: site.rank for site in sites}

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
