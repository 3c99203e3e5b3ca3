"""Pair: one site's A and B, as optimizers and analyses take them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted
from rankwise.shapes import Float
from rankwise.variants.base import PairLayer


@dataclass(frozen=True, eq=False)
class Pair:
    """One site's pair, live: it follows training.

    Attributes:
        name: the site's module path.
        layer: the adapter layer that holds it.
    """

    name: str
    layer: PairLayer

    @property
    def A(self) -> Float[Tensor, "r in"]:
        """The effective A [r, in]: start + δ."""
        return self.layer.A

    @property
    def B(self) -> Float[Tensor, "out r"]:
        """The effective B [out, r]: start + δ."""
        return self.layer.B

    @property
    def scale(self) -> float:
        """s of ΔW = s(BA − B₀A₀)."""
        return self.layer.scale

    @property
    def notes(self) -> Mapping[str, float]:
        """Figures that the start left about itself, such as "adam_cosine" with ``align="adam"``."""
        return self.layer.notes

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The trained tensors behind A and B."""
        return self.layer.lora_A, self.layer.lora_B


def pairs(model: nn.Module, name: str | None = None) -> list[Pair]:
    """The pairs of one adapter (the active one by default), in the model's order.

    Raises:
        AttachError: no such adapter, or none or several are active and no name is given.
    """
    adapted = Adapted.of(model)
    layers = adapted.adapter_layers(adapted.adapter_name(name))
    return [Pair(path, layer) for path, layer in layers.items() if isinstance(layer, PairLayer)]
