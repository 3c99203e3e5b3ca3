"""Variants: what is done with the pair. One file a method, one row in the table."""

from rankwise.methods import Method, lazy_attributes

VARIANTS: dict[str, Method] = {
    "lora": Method(".variants.lora:Lora", "arXiv 2106.09685", "W₀ + s(BA − B₀A₀)"),
    "dora": Method(
        ".variants.dora:Dora", "arXiv 2402.09353", "m ⊙ (W₀ + s(BA − B₀A₀)) / ‖·‖: each row's length trained apart"
    ),
    "adalora": Method(
        ".variants.adalora:AdaLora",
        "arXiv 2303.10512",
        "W₀ + s·B diag(λ) A: ranks shared out by importance while training",
    ),
    "bottleneck": Method(
        ".variants.bottleneck:BottleneckVariant",
        "arXiv 1902.00751",
        "y + up(act(down(y))) behind a layer: no change of its weight, so it stays at inference",
    ),
}

__getattr__ = lazy_attributes(
    __name__,
    VARIANTS,
    {
        "AdapterLayer": ".variants.base:AdapterLayer",
        "FoldableLayer": ".variants.base:FoldableLayer",
        "PairLayer": ".variants.base:PairLayer",
        "Variant": ".variants.base:Variant",
    },
)
