"""VeRA: a frozen random pair and a trained vector for each of its halves (Kopiczko 2024, arXiv 2310.11454)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from rankwise.algebra.low_rank import LowRank
from rankwise.layers.kinds import Kind
from rankwise.shapes import Float
from rankwise.sites import Site, Start
from rankwise.variants.base import ALL, FoldableLayer, Variant


class VeraLayer(FoldableLayer):
    """ΔW = s·diag(b) B diag(d) A.

    Attributes:
        A [r, in], B [out, r]: frozen, and in no file: they are drawn from the seed.
        d [r], b [out]: the trained vectors; b = 0 at the start.
    """

    A: Tensor
    B: Tensor

    def __init__(self, site: Site, kind: Kind, dropout: float, start: Start, d: float) -> None:
        super().__init__(site, kind, dropout)
        self.register_buffer("A", start.A, persistent=False)
        self.register_buffer("B", start.B, persistent=False)
        self.d = nn.Parameter(start.A.new_full((site.rank,), d))
        self.b = nn.Parameter(start.B.new_zeros(site.shape[0]))

    def delta(self) -> LowRank:
        return LowRank(self.b[:, None] * self.B, self.d[:, None] * self.A, self.scale)

    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        change = self.delta()
        return self.kind.add(layer, x, y, change.A, change.B, change.scale, self.active_dropout)

    def change(self, weight: Float[Tensor, "n in"], rows: slice = ALL) -> Float[Tensor, "n in"]:
        return self.delta().rows(rows).dense().to(weight.dtype)


@dataclass(frozen=True)
class Vera(Variant):
    """W₀ + s·diag(b) B diag(d) A; the paper's s is 1, which is alpha = rank here.

    The paper draws one pair for all layers of equal shape; here each site has its own, from the seed and its name.

    Attributes:
        d: what each entry of d starts at.
    """

    d: float = 0.1

    takes_start: ClassVar[bool] = False

    def parameters(self, site: Site) -> int:
        return site.rank + site.shape[0]

    def adjusted(self, start: Start, generator: Generator, *, default: bool) -> Start:
        A, B = (_kaiming(half, generator) for half in (start.A, start.B))
        return Start(A, B, cancel=False)

    def build(self, site: Site, kind: Kind, weight: Tensor, start: Start, dropout: float) -> VeraLayer:
        return VeraLayer(site, kind, dropout, start, self.d)


def _kaiming(like: Tensor, generator: Generator) -> Tensor:
    """U(−√(3/n), √(3/n)) for n columns, from the CPU so that every device sees the same."""
    bound = (3 / like.shape[1]) ** 0.5
    return (torch.rand(like.shape, generator=generator) * 2 * bound - bound).to(like)
