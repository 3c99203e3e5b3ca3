"""LoRA: y + s(BA − B₀A₀)x (Hu 2021, arXiv 2106.09685), for any start pair."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from rankwise.algebra.low_rank import LowRank, difference
from rankwise.layers.kinds import Kind
from rankwise.sites import Site, Start
from rankwise.variants.base import PairLayer, PairVariant


class LoraLayer(PairLayer):
    """ΔW = s(δB·A + B₀·δA), of rank 2r; s·BA of rank r where there is no anchor. An earlier change comes on top."""

    def delta(self) -> LowRank:
        if self.start_A is None or self.start_B is None:
            pair = LowRank(self.lora_B, self.lora_A, self.scale)
        else:
            pair = difference(self.lora_B, self.lora_A, self.start_B, self.start_A, self.scale)
        return pair if self.earlier is None else pair + self.earlier.delta()

    def running(self) -> LowRank:
        """What must be added to the layer's output now."""
        return self.delta()

    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        term = self.running()
        return self.kind.add(layer, x, y, term.A, term.B, term.scale, self.active_dropout)


class FoldedLoraLayer(LoraLayer):
    """The same adapter on a layer whose weight holds W₀ − sB₀A₀: r columns a forward instead of 2r."""

    def running(self) -> LowRank:
        return LowRank(self.B, self.A, self.scale)

    def start_to_fold(self) -> LowRank:
        assert self.start_A is not None and self.start_B is not None
        return LowRank(self.start_B, self.start_A, self.scale)


@dataclass(frozen=True)
class Lora(PairVariant):
    """W = W₀ + s(BA − B₀A₀)."""

    def anchored(self, anchor: Literal["frozen", "fold"]) -> "Lora":
        return FoldedLora() if anchor == "fold" else self

    def build(self, site: Site, kind: Kind, weight: Tensor, start: Start, dropout: float) -> LoraLayer:
        return LoraLayer(site, kind, dropout, start, anchored=start.needs_anchor)

    def restore(self, site: Site, kind: Kind, weight: Tensor, delta: LowRank, extra: Mapping[str, Tensor]) -> LoraLayer:
        return LoraLayer(site, kind, 0.0, Start(delta.A, delta.B), anchored=False)


@dataclass(frozen=True)
class FoldedLora(Lora):
    """What ``anchor="fold"`` builds: the caller takes the start off the base weight."""

    def build(self, site: Site, kind: Kind, weight: Tensor, start: Start, dropout: float) -> LoraLayer:
        cls = FoldedLoraLayer if start.needs_anchor else LoraLayer
        return cls(site, kind, dropout, start, anchored=start.needs_anchor)
