"""The bottleneck adapter: y + up(act(down(y))) on a layer's output (Houlsby 2019, arXiv 1902.00751)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rankwise.layers.kinds import Kind
from rankwise.sites import Site
from rankwise.variants.base import AdapterLayer

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

    def __init__(
        self, site: Site, kind: Kind, activation: str, dropout: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(site, kind, dropout)
        out = site.shape[0]
        self.activation = activation
        # nn.Linear draws values, which are replaced, from the global random state.
        with torch.random.fork_rng(devices=[]):
            self.down = nn.Linear(out, site.rank, dtype=dtype, device=device)
            self.up = nn.Linear(site.rank, out, dtype=dtype, device=device)

    @torch.no_grad()
    def start(self, generator: Generator) -> "BottleneckLayer":
        """Draw D from the generator, set the rest to zero."""
        self.down.weight.copy_(torch.randn(self.down.weight.shape, generator=generator) * 0.01)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            tensor.zero_()
        return self

    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = ACTIVATIONS[self.activation](_linear(self.down, y))
        return y + _linear(self.up, F.dropout(h, self.active_dropout))

    def extra_repr(self) -> str:
        return f"{self.site.kind} {self.site.shape[0]}, width={self.site.rank}, {self.activation}"


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In x's dtype, which is the compute type."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
