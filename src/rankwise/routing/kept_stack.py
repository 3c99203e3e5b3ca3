"""A layer's adapters stacked, and kept for as long as they are what was stacked: generation uses them many times."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.adapted.slot import Slot
from rankwise.routing.grouped_product import Stack, add_stacked
from rankwise.routing.mixing import products
from rankwise.routing.rows import Blocks, Rows
from rankwise.variants.lora import LoraLayer


@dataclass(frozen=True)
class KeptStack:
    """The stacked factors of all adapters that the rows of a batch have at one layer.

    Attributes:
        names: of the rows.
        adapters: adapter name → its layer.
        state: what it was stacked from (:func:`_state`).
    """

    names: tuple[str | None, ...]
    adapters: dict[str, LoraLayer]
    state: list[int]
    blocks: Blocks
    stack: Stack

    @staticmethod
    def of(slot: Slot, rows: Rows, names: list[str], dtype: torch.dtype) -> "KeptStack | None":
        """None where some of the named adapters is no mere product, or where most blocks would be copies.

        Factors are copied for each block of rows; adapters whose rows lie scattered in many have many rows each, for
        which a loop over adapters is as fast.
        """
        adapters, blocks = products(slot, names), rows.blocks(names)
        if not names or len(adapters) < len(names) or len(blocks.names) > 2 * len(names):
            return None
        terms = {name: adapter.running() for name, adapter in adapters.items()}
        stack = Stack.of(terms, blocks.names, dtype)
        return KeptStack(rows.names, adapters, _state(adapters), blocks, stack)

    def holds(self, slot: Slot, rows: Rows, dtype: torch.dtype) -> bool:
        """Whether it is still what these rows have at the slot."""
        present: Any = slot.adapters
        modules = present._modules
        return (
            (self.names is rows.names or self.names == rows.names)
            and self.stack.A.dtype == dtype
            and all(modules.get(name) is adapter for name, adapter in self.adapters.items())
            and (len(self.adapters) == len(rows.adapters) or set(self.adapters) == rows.adapters.keys() & modules)
            and self.state == _state(self.adapters)
        )

    def drops(self) -> bool:
        """Whether dropout is in force in one of the adapters."""
        return any(adapter.dropout and adapter.training for adapter in self.adapters.values())

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y with the adapters' products, in y's memory."""
        return add_stacked(y, x, self.blocks, self.stack)


def _state(adapters: dict[str, LoraLayer]) -> list[int]:
    """Changes whenever the adapters' tensors do: torch counts what is written into each, but past ``.data``."""
    state = []
    for adapter in adapters.values():
        parameters = adapter._parameters
        for factor in (parameters["lora_A"], parameters["lora_B"]):
            assert factor is not None
            state += [0 if factor.is_inference() else factor._version, factor.data_ptr()]
        state.append(id(adapter.earlier))
    return state
