"""One layer's output for a batch whose rows belong to different adapters."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from rankwise.adapted.slot import Slot
from rankwise.algebra.low_rank import LowRank
from rankwise.in_place import writable
from rankwise.layers.kinds import CONV1D, LINEAR
from rankwise.routing.grouped_product import Group, add_groups
from rankwise.routing.rows import Rows
from rankwise.variants.lora import LoraLayer


def one_by_one(y: Tensor, x: Tensor, rows: Rows, slot: Slot, layer: nn.Module, names: Collection[str]) -> Tensor:
    """Each adapter by its own ``adapt`` on the rows that belong to it: what every faster way must equal."""
    for name in names:
        index = torch.tensor(rows.adapters[name], device=y.device)
        y = y.index_copy(0, index, slot.adapters[name].adapt(layer, x[index], y[index]))
    return y


def grouped(y: Tensor, x: Tensor, rows: Rows, slot: Slot, layer: nn.Module, names: Collection[str]) -> Tensor:
    """The same, with all adapters that are products in one node of autograd."""
    adapters = products(slot, names)
    if adapters:
        y = add_groups(writable(layer, y), x, _groups(adapters, rows, y.device))
    return one_by_one(y, x, rows, slot, layer, [name for name in names if name not in adapters])


def products(slot: Slot, names: Collection[str]) -> dict[str, LoraLayer]:
    """Those of the named adapters that add s·x Aᵀ Bᵀ, and do no more."""
    adapters = {name: slot.adapters[name] for name in names}
    return {
        name: adapter
        for name, adapter in adapters.items()
        if isinstance(adapter, LoraLayer)
        and type(adapter).adapt is LoraLayer.adapt
        and adapter.kind in (LINEAR, CONV1D)
    }


def _groups(adapters: Mapping[str, LoraLayer], rows: Rows, device: torch.device) -> list[tuple[Group, LowRank]]:
    groups = []
    for name, adapter in adapters.items():
        term = adapter.running()
        groups.append((Group.of(rows.of(name, device), term.scale, adapter.active_dropout), term))
    return groups
