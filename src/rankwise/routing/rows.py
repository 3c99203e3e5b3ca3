"""Rows: which adapter each row of a batch belongs to, and what that means for one layer's input."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from rankwise.adapted.slot import Slot
from rankwise.errors import RoutingError
from rankwise.shapes import Int


class Rows:
    """One adapter name, or None for the bare base, for each row of a batch.

    Attributes:
        names: of the rows, in order.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that some row belongs to, each once."""
        return tuple(dict.fromkeys(name for name in self.names if name is not None))

    def of(self, name: str) -> list[int]:
        """The rows that belong to an adapter."""
        return [row for row, other in enumerate(self.names) if other == name]

    def adapt(self, slot: Slot, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y with each row's adapter's part; rows of no adapter here are left alone.

        Raises:
            RoutingError: the layer's input does not tell the rows apart.
        """
        present = [name for name in self.adapters if name in slot.adapters]
        if not present:
            return y
        if set(self.names) == set(present[:1]):
            return slot.add(layer, x, y, present)
        axes = y.dim() + slot.adapters[present[0]].kind.output_axis
        return per_row(self._in_rows(slot, x, axes), self._in_rows(slot, y, axes), self, slot, layer, present, y)

    def _in_rows(self, slot: Slot, tensor: Tensor, axes: int) -> Tensor:
        """The tensor with one entry a row along its first axis: a view.

        Args:
            axes: how many of its axes stand before those of one vector or image.
        """
        count = len(self.names)
        size = tensor.shape[0] if axes else 0
        if size == count:
            return tensor
        if size == 1:  # what all rows share, such as position ids [1, t]
            return tensor.expand(count, *tensor.shape[1:])
        if axes == 1 and size and size % count == 0:  # tokens in a row, sequence after sequence
            return tensor.view(count, -1, *tensor.shape[1:])
        raise RoutingError(
            f"{slot.site_name}: the input {list(tensor.shape)} of this layer does not tell {count} rows apart; "
            f"expected [{count}, ...], [1, ...] or [{count}·length, features]: leave the layer out of the adapters "
            f"(exclude_modules), or run each adapter's rows in a batch of their own"
        )


def per_row(
    x: Tensor, y: Tensor, rows: Rows, slot: Slot, layer: nn.Module, present: Collection[str], like: Tensor
) -> Tensor:
    """Each adapter on the rows that belong to it, by its own ``adapt``: what every faster way must equal."""
    indices = {name: _index(rows.of(name), y) for name in present}
    parts = [slot.adapters[name].adapt(layer, x[index], y[index]) for name, index in indices.items()]
    adapted = y.index_copy(0, torch.cat(list(indices.values())), torch.cat(parts))
    return adapted.reshape(-1, *like.shape[1:])


def _index(rows: Sequence[int], like: Tensor) -> Int[Tensor, " rows"]:
    return torch.tensor(rows, device=like.device)
