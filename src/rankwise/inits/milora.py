"""MiLoRA: start from the minor singular directions of the weight."""

from dataclasses import dataclass

from torch import Generator, Tensor

from rankwise.algebra.svd import smallest_svd
from rankwise.inits.base import Init, balanced_start
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Milora(Init):
    """s·B₀A₀ = U₋ᵣ S₋ᵣ V₋ᵣᵀ, the last r of the min(out, in) triplets of W = U S Vᵀ (Wang 2024, arXiv 2406.09044).

    Training begins in the directions that the pretrained weight uses least. One whole SVD a weight.
    """

    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: None, generator: Generator) -> Start:
        return balanced_start(smallest_svd(weight, site.rank), site.scale)
