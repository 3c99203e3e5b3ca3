"""`rankwise methods`, as tables. The library's own tables name each method's class and import none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from rankwise.combinations import COMBINATIONS
from rankwise.methods import Method
from rankwise.optim import OPTIMIZERS
from rankwise.spec_checks import METHOD_FIELDS


def methods_tables() -> Iterator[Table]:
    """A table for each field of a recipe that names a method, and one of those that combine adapters."""
    tables: dict[str, Mapping[str, Method]] = {**METHOD_FIELDS, "optimizer": OPTIMIZERS, "combination": COMBINATIONS}
    for field, methods in tables.items():
        table = Table("name", "what it does", "paper", title=field, title_justify="left")
        for name, method in methods.items():
            table.add_row(name, method.summary, method.paper)
        yield table
