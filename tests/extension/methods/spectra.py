"""Spectra: a start whose singular values are a power of the weight's."""

from dataclasses import dataclass

from torch import Generator, Tensor

from rankwise.algebra.svd import truncated_svd
from rankwise.errors import SpecError
from rankwise.inits.base import Init, balanced_start
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Spectra(Init):
    """s·B₀A₀ = U_r S_r^p V_rᵀ for the weight's leading triplets; p = 1 is PiSSA.

    Attributes:
        power: p.
    """

    power: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.power <= 2:
            raise SpecError(f"init 'spectra': power must be a number in (0, 2], found {self.power!r}")

    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: None, generator: Generator) -> Start:
        U, S, V = truncated_svd(weight, site.rank, generator, iterations=8)
        return balanced_start((U, S**self.power, V), site.scale)
