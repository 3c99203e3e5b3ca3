"""The LoRA paper's own start: A Gaussian, B = 0."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rankwise.inits.base import Init, embedding_start
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Gaussian(Init):
    """A ~ N(0, 1/r²), B = 0 (Hu 2021, section 4.1; the standard deviation 1/r is the reference code's)."""

    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: None, generator: Generator) -> Start:
        out, into = site.shape
        if site.kind == "embedding":
            return embedding_start(weight, site, generator)
        A = torch.randn(site.rank, into, generator=generator) / site.rank
        return Start(A.to(weight), weight.new_zeros(out, site.rank))
