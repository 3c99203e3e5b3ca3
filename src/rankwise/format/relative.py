"""Pairs that PEFT trained on a base it had changed, as changes of the base as it was.

With ``init_lora_weights`` "pissa" or "olora" PEFT takes s·B₀A₀, which it finds from W alone, off the base, and does so
again whenever it reads the file. What such a file means is ΔW = s(BA − B₀A₀), here in the difference form.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.algebra.low_rank import LowRank, difference
from rankwise.errors import UnsupportedAdapter
from rankwise.foldable import parameter_owners
from rankwise.layers.kinds import Kind
from rankwise.layers.quantised import is_quantised
from rankwise.shapes import Float
from rankwise.sites import base_modules

Start = tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]


def pissa_start(layer: Any, kind: Kind, rank: int, scale: float) -> Start:
    """B₀ = U_r √(S_r/s), A₀ = √(S_r/s) V_rᵀ of W = U S Vᵀ (Meng 2024, arXiv 2404.02948)."""
    u, s, vh = torch.linalg.svd(kind.weight(layer).float(), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def olora_start(layer: Any, kind: Kind, rank: int, scale: float) -> Start:
    """B₀ = Q[:, :r], A₀ = R[:r] of the weight = QR as it is stored (Büyükakyüz 2024, arXiv 2406.01775).

    A Conv1D stores Wᵀ, and PEFT decomposes that.
    """
    q, r = torch.linalg.qr(layer.weight.detach().float())
    start = q[:, :rank], r[:rank]
    return (start[1].T, start[0].T) if kind.name == "conv1d" else start


STARTS: dict[str, Callable[[Any, Kind, int, float], Start]] = {"pissa": pissa_start, "olora": olora_start}


def check_untied(start: str, model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse layers whose weight another module shares: PEFT's start changes that module too.

    Raises:
        UnsupportedAdapter: as it says.
    """
    owners, modules = parameter_owners(model), base_modules(model)
    for path in paths:
        layer: Any = modules.get(path)
        tied = owners[id(layer.weight)] if isinstance(layer, nn.Linear) else []
        if len(tied) > 1:
            raise UnsupportedAdapter(
                f"{path}: its weight is shared by {', '.join(tied)}, which init_lora_weights {start!r} changes along "
                f"with it; expected a weight of its own: untie them, or train without"
            )


@torch.no_grad()
def change_of_base(start: str, path: str, layer: Any, kind: Kind, pair: LowRank) -> LowRank:
    """What a pair of a file with such a start changes of the layer's own weight, of rank 2r.

    Raises:
        UnsupportedAdapter: PEFT has no such start for the layer.
    """
    if kind.name == "embedding":  # whose base PEFT leaves alone
        return pair
    if kind.name == "conv2d" or is_quantised(layer):
        raise UnsupportedAdapter(
            f"{path}: init_lora_weights {start!r} on a {type(layer).__name__}, whose weight has no such decomposition "
            f"to start from; expected a linear layer in floating point: load the base unquantised"
        )
    B, A = (tensor.to(pair.B) for tensor in STARTS[start](layer, kind, pair.rank, pair.scale))
    # A decomposition leaves signs open; those nearer to the pair keep the differences small.
    signs = torch.where((B * pair.B).sum(0) + (A * pair.A).sum(1) < 0, -1.0, 1.0).to(B)
    B, A = B * signs, signs[:, None] * A
    return difference(pair.B - B, pair.A - A, B, A, pair.scale)
