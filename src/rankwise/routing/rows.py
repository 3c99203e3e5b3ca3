"""Rows: which adapter each row of a batch belongs to, and how rows lie together."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd

import torch
from torch import Tensor

from rankwise.adapted.slot import Slot


@dataclass(frozen=True)
class Blocks:
    """Rows of the same length of blocks, each block with one adapter.

    Attributes:
        count: of all blocks.
        names: the adapter of each block that has one.
        chosen: those blocks among all; None where all of them have one.
    """

    count: int
    names: tuple[str, ...]
    chosen: list[int] | None


class Rows:
    """One adapter name, or None for the bare base, for each row of a batch.

    Attributes:
        names: of the rows, in order.
        adapters: adapter name → its rows.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.adapters: Mapping[str, list[int]] = {
            name: [row for row, other in enumerate(self.names) if other == name]
            for name in dict.fromkeys(self.names)
            if name is not None
        }
        self._indices: dict[tuple[str, torch.device], slice | Tensor] = {}
        self._blocks: dict[tuple[str, ...], Blocks] = {}

    @property
    def are_alike(self) -> bool:
        """Whether all rows belong to one adapter."""
        return len(set(self.names)) == 1

    def present(self, slot: Slot) -> list[str]:
        """The adapters that are at this slot."""
        return [name for name in self.adapters if name in slot.adapters]

    def of(self, name: str, device: torch.device) -> slice | Tensor:
        """The rows that belong to an adapter: a slice where they follow each other."""
        key = name, device
        if key not in self._indices:
            rows = self.adapters[name]
            follow = rows[-1] - rows[0] == len(rows) - 1
            self._indices[key] = slice(rows[0], rows[-1] + 1) if follow else torch.tensor(rows, device=device)
        return self._indices[key]

    def blocks(self, names: Collection[str]) -> Blocks:
        """The longest blocks of rows in which all belong to one of these adapters, or none does."""
        key = tuple(names)
        if key not in self._blocks:
            wanted = [name if name in key else None for name in self.names]
            length = gcd(*(len(list(run)) for _, run in groupby(wanted)))
            firsts = wanted[::length]
            chosen = [block for block, name in enumerate(firsts) if name is not None]
            owners = tuple(name for name in firsts if name is not None)
            self._blocks[key] = Blocks(len(firsts), owners, None if len(owners) == len(firsts) else chosen)
        return self._blocks[key]
