"""The bottleneck adapter: y + up(act(down(y))) on a layer's output (Houlsby 2019, arXiv 1902.00751)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rankwise.errors import SpecError, TargetError
from rankwise.layers.kinds import Kind
from rankwise.methods import nearest
from rankwise.sites import Site, Start
from rankwise.variants.base import AdapterLayer, Variant

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckLayer(AdapterLayer):
    """y + U act(D y + c) + b with D [width, out], U [out, width]; U = 0 and c = b = 0 at the start, D ~ N(0, 0.01²).

    It is not linear in y, so no weight can hold it: it has no ``fold``, and it stays at inference.
    """

    def __init__(self, site: Site, kind: Kind, activation: str, dropout: float, down: Tensor) -> None:
        super().__init__(site, kind, dropout)
        self.activation = activation
        width, out = down.shape
        # nn.Linear draws values, which are replaced, from the global random state.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            self.down = nn.Linear(out, width, dtype=down.dtype, device=down.device)
            self.up = nn.Linear(width, out, dtype=down.dtype, device=down.device)
            self.down.weight.copy_(down)
            for tensor in (self.down.bias, self.up.weight, self.up.bias):
                tensor.zero_()

    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = ACTIVATIONS[self.activation](_linear(self.down, y))
        return y + _linear(self.up, F.dropout(h, self.active_dropout))

    def extra_repr(self) -> str:
        return f"{self.site.kind} {self.site.shape[0]}, width={self.site.rank}, {self.activation}"


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In x's dtype, which is the compute type."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


@dataclass(frozen=True)
class BottleneckVariant(Variant):
    """y + up(act(down(y))); the spec's rank is the width. Several act one after the other.

    Houlsby 2019 puts one behind each sub-layer's last projection, before the residual sum.

    Attributes:
        activation: "gelu", "relu", "silu" or "tanh".
    """

    activation: str = "gelu"

    takes_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            hint = nearest(self.activation, ACTIVATIONS)
            raise SpecError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {self.activation!r}{hint}")

    def check_site(self, site: Site, kind: Kind) -> None:
        if kind.output_axis != -1:
            raise TargetError(
                f"{site.name} is a {kind.name}, but a bottleneck reads outputs on the last axis; exclude it"
            )

    def parameters(self, site: Site) -> int:
        out, width = site.shape[0], site.rank
        return 2 * width * out + width + out

    def adjusted(self, start: Start, generator: Generator, *, default: bool) -> Start:
        """D as A [width, out]: the bottleneck works on the layer's output. There is no B."""
        out, width = start.B.shape
        D = torch.randn(width, out, generator=generator) * 0.01
        return Start(D.to(start.B), start.B.new_zeros(out, width))

    def build(self, site: Site, kind: Kind, weight: Tensor, start: Start, dropout: float) -> BottleneckLayer:
        return BottleneckLayer(site, kind, self.activation, dropout, start.A)
