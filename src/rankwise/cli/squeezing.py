"""`rankwise squeeze`: from one directory to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

import rankwise as rw
from rankwise.algebra import Squeezed
from rankwise.errors import CheckpointError
from rankwise.train.data.labels import read_labels, save_labels


def save_squeezed(adapter: Path, out: Path, **how_few: Any) -> Squeezed:
    """Squeeze the adapter in one directory into another.

    Raises:
        CheckpointError: ``out`` holds files. What ``rankwise.read`` and ``squeeze`` raise; nothing is written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: expected a new or empty directory, found files in it; choose another")
    squeezed: Squeezed = rw.algebra.squeeze(rw.read(adapter), **how_few)
    rw.write(squeezed.adapter, out)
    labels = read_labels(adapter)
    if labels is not None:
        save_labels(out, labels)
    return squeezed


def squeeze_table(squeezed: Squeezed, out: Path) -> Table:
    """What was kept, what was lost, and where the adapter lies."""
    ranks = sorted(site.delta.rank for site in squeezed.adapter.sites.values())
    worst = max(squeezed.errors, key=lambda path: squeezed.errors[path])
    table = Table(title="Squeezed", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("ranks", f"{ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}, at {len(ranks)} layers")
    table.add_row("numbers", f"{squeezed.parameters:,}")
    table.add_row("change lost", f"{squeezed.error:.2%}; {squeezed.errors[worst]:.2%} at the worst layer, {worst}")
    table.add_row("adapter", str(out))
    return table
