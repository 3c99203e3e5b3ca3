"""PiSSA: start from the principal singular directions of the weight."""

from dataclasses import dataclass

from torch import Generator, Tensor

from rankwise.algebra.svd import truncated_svd
from rankwise.inits.base import Init, balanced_start
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Pissa(Init):
    """s·B₀A₀ = the best rank-r approximation of W: B₀ = U_r √(S_r/s), A₀ = √(S_r/s) V_rᵀ (Meng 2024, arXiv 2404.02948).

    Attributes:
        iterations: of the randomised SVD; more is closer to the exact one.
    """

    iterations: int = 8

    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: None, generator: Generator) -> Start:
        return balanced_start(truncated_svd(weight, site.rank, generator, iterations=self.iterations), site.scale)
