"""CorDA: start from the weight's singular directions as the data's covariance weighs them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from rankwise.algebra.svd import smallest_svd, truncated_svd
from rankwise.errors import EvidenceError, SpecError
from rankwise.inits.base import CovarianceEvidence, EvidenceNeed, Init, balanced_start
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Corda(Init):
    """s·B₀A₀ = U_r S_r V_rᵀ C⁻¹ with W C = U S Vᵀ and C = Σ x xᵀ / n of the inputs (Yang 2024, arXiv 2406.05223).

    C is scaled to mean diagonal 1, so that only its shape counts (C ∝ 1 gives PiSSA), and damped as the reference
    does: a multiple 0.01, 0.02, 0.04 … of the identity is added until its inverse is accurate.

    Attributes:
        mode: which r directions are trained. "ipm" (instruction-previewed): the first, with batches of the task to
            learn. "kpm" (knowledge-preserved): the last, with batches of what must not be forgotten; one whole SVD.
    """

    mode: Literal["ipm", "kpm"] = "ipm"

    needs: ClassVar[EvidenceNeed] = "covariance"

    def __post_init__(self) -> None:
        if self.mode not in ("ipm", "kpm"):
            raise SpecError(f"init 'corda': mode must be 'ipm' or 'kpm', found {self.mode!r}")

    def check(self, site: Site) -> None:
        super().check(site)
        if site.kind == "embedding":
            raise SpecError(f"{site.name}: init 'corda' needs input vectors, an embedding's inputs are ids; exclude it")

    def __call__(
        self, weight: Float[Tensor, "out in"], site: Site, evidence: CovarianceEvidence, generator: Generator
    ) -> Start:
        C, inverse = damped_inverse(evidence.matrix.to(weight), site.name)
        turned = weight @ C
        if self.mode == "ipm":
            u, s, v = truncated_svd(turned, site.rank, generator)
        else:
            u, s, v = smallest_svd(turned, site.rank)
        return balanced_start((u, s, inverse @ v), site.scale)


def damped_inverse(
    covariance: Float[Tensor, "in in"], site_name: str
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "in in"]]:
    """C/mean(diag C) + d·1 and its inverse, with the least d of 0.01, 0.02, 0.04 … for which ‖C C⁻¹ − 1‖_F < 0.05.

    Raises:
        EvidenceError: the covariance is zero.
    """
    mean = covariance.diagonal().mean()
    if not mean > 0:
        raise EvidenceError(
            f"{site_name}: its inputs are all zero; expected a layer that sees data, look at the batches"
        )
    scaled = covariance / mean
    identity = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    damping = 0.01
    while True:
        damped = scaled + damping * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
        damping *= 2
