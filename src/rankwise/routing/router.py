"""Router: what a model's slots ask, inside and after ``route``, which rows belong to which adapter.

Gradient checkpointing runs forwards again in the backward pass, when the block may have been left and another entered.
Each block's rows are therefore remembered by the autograd nodes that were made in it: nodes are numbered in the order
in which they are made, and a forward that runs again does so for a node of its block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C import _current_autograd_node, _current_graph_task_id
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]

from rankwise.adapted.slot import Slot
from rankwise.errors import RoutingError
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
    """

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.first = 0
        self.spans: list[Span] = []
        self.forgotten = 0

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
        rows = self._rows_now()
        return slot.add(layer, x, y, slot.active) if rows is None else rows.adapt(slot, layer, x, y)

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
