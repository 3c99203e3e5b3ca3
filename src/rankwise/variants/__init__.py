"""Variants: what is done with the pair. One file a method, one line in the table."""

from rankwise.registry import Entry
from rankwise.variants.base import AdapterLayer, PairLayer, Variant
from rankwise.variants.lora import FoldedLora, FoldedLoraLayer, Lora, LoraLayer

VARIANTS: dict[str, Entry] = {
    "lora": Entry(Lora, "arXiv 2106.09685", "W₀ + s(BA − B₀A₀)"),
}

__all__ = ["VARIANTS", "AdapterLayer", "FoldedLora", "FoldedLoraLayer", "Lora", "LoraLayer", "PairLayer", "Variant"]
