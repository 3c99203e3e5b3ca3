"""LoRA-FA: A stays where it starts and B alone is trained (Zhang 2023, arXiv 2308.03303)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rankwise.algebra.low_rank import LowRank
from rankwise.layers.kinds import Kind
from rankwise.sites import Site, Start
from rankwise.variants.base import PairVariant
from rankwise.variants.lora import LoraLayer


class FrozenALayer(LoraLayer):
    """ΔW = s·δB·A₀, of rank r whatever the start."""

    frozen: ClassVar[tuple[str, ...]] = ("lora_A",)

    def delta(self) -> LowRank:
        return LowRank(self.lora_B, self.A, self.scale)


@dataclass(frozen=True)
class FrozenA(PairVariant):
    """W₀ + s·δB·A₀. An A₀ that a start leaves at zero is drawn, as no gradient would reach B."""

    def parameters(self, site: Site) -> int:
        return site.rank * site.shape[0]

    def adjusted(self, start: Start, generator: Generator, *, default: bool) -> Start:
        if start.A.any():
            return start
        drawn = torch.randn(start.A.shape, generator=generator) / start.A.shape[1] ** 0.5
        return replace(start, A=drawn.to(start.A))

    def build(self, site: Site, kind: Kind, weight: Tensor, start: Start, dropout: float) -> FrozenALayer:
        return FrozenALayer(site, kind, dropout, start, anchored=start.needs_anchor)

    def restore(
        self, site: Site, kind: Kind, weight: Tensor, delta: LowRank, extra: Mapping[str, Tensor]
    ) -> FrozenALayer:
        return FrozenALayer(site, kind, 0.0, Start(delta.A, delta.B), anchored=False)
