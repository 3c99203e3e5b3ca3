"""`rankwise methods`, as tables. The library's own tables name each method's class and import none."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from rankwise.optim import OPTIMIZERS
from rankwise.spec import METHOD_FIELDS


def methods_tables() -> Iterator[Table]:
    """A table for each field of a recipe that names a method."""
    for field, methods in {**METHOD_FIELDS, "optimizer": OPTIMIZERS}.items():
        table = Table("name", "what it does", "paper", title=field, title_justify="left")
        for name, method in methods.items():
            table.add_row(name, method.summary, method.paper)
        yield table
