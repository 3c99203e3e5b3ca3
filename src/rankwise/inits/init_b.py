"""Init[B]: A = 0, B random."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rankwise.inits.base import Init
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class InitB(Init):
    """A = 0, B ~ U(−1/√r, 1/√r): stable, but learns features less (Hayou 2024, arXiv 2406.08447)."""

    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: None, generator: Generator) -> Start:
        out, into = site.shape
        bound = 1.0 / math.sqrt(site.rank)
        B = torch.empty(out, site.rank).uniform_(-bound, bound, generator=generator)
        return Start(weight.new_zeros(site.rank, into), B.to(weight))
