"""Router: what a model's slots ask, inside and after ``route``, which rows belong to which adapter.

Gradient checkpointing runs forwards again in the backward pass, when the block may have been left and another entered.
Each block's rows are therefore remembered by the autograd nodes that were made in it: nodes are numbered in the order
in which they are made, and a forward that runs again does so for a node of its block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_autograd_node, _current_graph_task_id
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]

from rankwise.adapted.slot import Slot
from rankwise.errors import RoutingError
from rankwise.in_place import is_transformed, writable
from rankwise.routing.kept_stack import KeptStack
from rankwise.routing.mixing import grouped, one_by_one
from rankwise.routing.rows import Rows

REMEMBERED = 4096


@dataclass(frozen=True)
class Span:
    """The autograd nodes with numbers from ``first`` up to ``end`` were made with these rows."""

    first: int
    end: int
    rows: Rows


class Router:
    """The rows of a model's batches.

    Attributes:
        rows: of the block that is open; None outside.
        first: the number of the first autograd node that can be made in it.
        spans: of earlier blocks in which nodes were made, the latest :data:`REMEMBERED` of them.
        forgotten: nodes with numbers below it may be of a block that is not remembered any more.
        length: the batch's second axis in the forward that runs, which tokens in one axis go by; None if not known.
        stacks: site name → the factors that were stacked there last.
    """

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.first = 0
        self.spans: list[Span] = []
        self.forgotten = 0
        self.length: int | None = None
        self.stacks: dict[str, KeptStack] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "stacks": {}}  # which can be made again

    def open(self, rows: Rows) -> None:
        """Begin a block."""
        self.rows, self.first = rows, _get_sequence_nr()

    def close(self) -> None:
        """End it."""
        assert self.rows is not None
        if self.first < (end := _get_sequence_nr()):
            self.spans.append(Span(self.first, end, self.rows))
        self.rows = None
        if len(self.spans) > REMEMBERED:
            self.forgotten = self.spans.pop(0).end

    def __call__(self, slot: Slot, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y with each row's adapter's part; rows of no adapter here are left alone.

        Raises:
            RoutingError: the layer's input does not tell the rows apart.
        """
        rows = self._rows_now()
        if rows is None:
            return slot.add(layer, x, y, slot.active)
        if torch.is_grad_enabled() or is_transformed():
            return self._adapted(rows, slot, layer, x, y)
        stack = self.stacks.get(slot.site_name)
        if stack is None or not stack.holds(slot, rows, y.dtype):
            stack = KeptStack.of(slot, rows, rows.present(slot), y.dtype)
            if stack is None:
                return self._adapted(rows, slot, layer, x, y)
            self.stacks[slot.site_name] = stack
        if stack.drops() or not (rows.are_alike or self._in_rows(y, rows, slot, y.dim() - 1) is y):
            return self._adapted(rows, slot, layer, x, y)
        return stack.add(writable(layer, y), x)

    def _adapted(self, rows: Rows, slot: Slot, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        names = rows.present(slot)
        if rows.are_alike or not names:
            return slot.add(layer, x, y, names)
        axes = y.dim() + slot.adapters[names[0]].kind.output_axis
        way = one_by_one if is_transformed() else grouped
        adapted = way(self._in_rows(y, rows, slot, axes), self._in_rows(x, rows, slot, axes), rows, slot, layer, names)
        return adapted if adapted.shape == y.shape else adapted.reshape(-1, *y.shape[1:])

    def _in_rows(self, tensor: Tensor, rows: Rows, slot: Slot, axes: int) -> Tensor:
        """The tensor with one entry a row along its first axis: a view.

        Args:
            axes: how many of its axes stand before those of one vector or image.
        """
        count, size = len(rows.names), tensor.shape[0] if axes else 0
        if size == 1 < count and (axes > 1 or tensor.dim() > 1):  # what all rows share, such as position ids [1, t]
            return tensor.expand(count, *tensor.shape[1:])
        if size == count and (axes > 1 or self._in_order(slot, tensor, 1)):
            return tensor
        if axes == 1 and size and size % count == 0 and self._in_order(slot, tensor, size // count):
            return tensor.view(count, -1, *tensor.shape[1:])  # tokens in one axis, sequence after sequence
        raise RoutingError(
            f"{slot.site_name}: {list(tensor.shape)} at this layer does not tell {count} rows apart; expected "
            f"[{count}, ...], [1, ...] or all tokens of all rows in order: leave the layer out of the adapters "
            f"(exclude_modules), or run each adapter's rows in a batch of their own"
        )

    def _in_order(self, slot: Slot, tensor: Tensor, length: int) -> bool:
        """Whether one axis goes row by row: ``length`` tokens of each, all that there are.

        It may as well be positions [t], or the tokens that chose an expert, of which there happen to be as many.
        """
        if tensor.dim() == 1 or {"expert", "experts"} & {*slot.site_name.split(".")}:
            return False
        known = None if torch.compiler.is_compiling() or _current_graph_task_id() != -1 else self.length
        return known is None or length == known or (length == 1 and known != len(tensor))

    def _rows_now(self) -> Rows | None:
        """Those of the open block; where a forward runs again in a backward pass, those that it ran with first."""
        if torch.compiler.is_compiling() or _current_graph_task_id() == -1:
            return self.rows
        node: int = _current_autograd_node()._sequence_nr()
        if self.rows is not None and node >= self.first:
            return self.rows
        if node < self.forgotten:
            raise RoutingError(
                f"a forward with gradient checkpointing runs again after {len(self.spans)} later blocks of "
                f"rankwise.route, and its rows are not remembered any more; call backward sooner"
            )
        return next((span.rows for span in reversed(self.spans) if span.first <= node < span.end), None)
