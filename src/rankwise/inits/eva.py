"""EVA: start from the directions that explain the layer's inputs, and give ranks to where they explain most."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from rankwise.errors import EvidenceError, SpecError
from rankwise.inits.base import ActivationEvidence, EvidenceNeed, Init
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Eva(Init):
    """A₀ = the r leading right-singular vectors of the centred inputs X, B₀ = 0 (Paischer 2024, arXiv 2410.07170).

    The ranks are redistributed under the same total: of all sites' directions, each site offering at most ρ·r, the Σr
    with the largest share of their site's input variance are kept. A site left with none carries no adapter. Scales
    stay as planned, so that all sites' gradients keep the same size.

    Attributes:
        rho: ρ ≥ 1; 1 leaves the ranks as they are.
    """

    rho: float = 2.0

    needs: ClassVar[EvidenceNeed] = "activations"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho >= 1):
            raise SpecError(f"init 'eva': rho must be a number of at least 1, found {self.rho!r}")

    def check(self, site: Site) -> None:
        super().check(site)
        if site.kind == "embedding":
            raise SpecError(f"{site.name}: init 'eva' needs input vectors, an embedding's inputs are ids; exclude it")

    def evidence_rank(self, site: Site) -> int:
        return min(round(self.rho * site.rank), *site.shape)

    def ranks(self, sites: Sequence[Site], evidence: Mapping[str, ActivationEvidence]) -> dict[str, int]:
        offered = [(share, site.name) for site in sites for share in self._offer(site, evidence[site.name])]
        offered.sort(key=lambda offer: -offer[0])  # stable: equal shares in the model's order
        kept = [name for _, name in offered[: sum(site.rank for site in sites)]]
        return {site.name: kept.count(site.name) for site in sites}

    def _offer(self, site: Site, evidence: ActivationEvidence) -> list[float]:
        """The shares of the at most ρ·r directions that a site offers, the largest first."""
        wanted, offered = self.evidence_rank(site), len(evidence.explained)
        if offered < wanted:
            raise EvidenceError(
                f"{site.name}: init 'eva' chooses from ρ·r = {wanted} input directions, the evidence has {offered}; "
                f"collect it with rankwise.activations(..., rank={wanted})"
            )
        return [float(share) for share in evidence.explained[:wanted]]

    def __call__(
        self, weight: Float[Tensor, "out in"], site: Site, evidence: ActivationEvidence, generator: Generator
    ) -> Start:
        A = evidence.components[: site.rank]
        return Start(A.to(weight), weight.new_zeros(site.shape[0], site.rank))
