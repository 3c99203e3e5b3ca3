"""Init[A], the default: A random, B = 0."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rankwise.inits.base import Init, embedding_start
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Kaiming(Init):
    """A ~ U(−1/√in, 1/√in), which is Kaiming uniform with a = √5, and B = 0.

    Stands larger learning rates than Init[B] and learns features better (Hayou 2024, arXiv 2406.08447).
    On an embedding A = 0, B ~ N(0, 1).
    """

    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: None, generator: Generator) -> Start:
        out, into = site.shape
        if site.kind == "embedding":
            return embedding_start(weight, site, generator)
        bound = 1.0 / math.sqrt(into)
        A = torch.empty(site.rank, into).uniform_(-bound, bound, generator=generator)
        return Start(A.to(weight), weight.new_zeros(out, site.rank))
