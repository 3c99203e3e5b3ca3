"""Variants: what is done with the pair. One file a method, one line in the table."""

from rankwise.methods import Entry
from rankwise.variants.adalora import AdaLora, AdaLoraLayer
from rankwise.variants.base import AdapterLayer, FoldableLayer, PairLayer, Variant
from rankwise.variants.bottleneck import ACTIVATIONS, BottleneckLayer
from rankwise.variants.dora import Dora, DoraLayer
from rankwise.variants.lora import FoldedLora, FoldedLoraLayer, Lora, LoraLayer

VARIANTS: dict[str, Entry] = {
    "lora": Entry(Lora, "arXiv 2106.09685", "W₀ + s(BA − B₀A₀)"),
    "dora": Entry(Dora, "arXiv 2402.09353", "m ⊙ (W₀ + s(BA − B₀A₀)) / ‖·‖: each row's length trained apart"),
    "adalora": Entry(AdaLora, "arXiv 2303.10512", "W₀ + s·B diag(λ) A: ranks shared out by importance while training"),
}

__all__ = [
    "ACTIVATIONS",
    "VARIANTS",
    "AdaLora",
    "AdaLoraLayer",
    "AdapterLayer",
    "BottleneckLayer",
    "Dora",
    "DoraLayer",
    "FoldableLayer",
    "FoldedLora",
    "FoldedLoraLayer",
    "Lora",
    "LoraLayer",
    "PairLayer",
    "Variant",
]
