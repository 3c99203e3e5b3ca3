"""What stands on the terminal while something is done that takes a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from transformers.utils import logging as transformers_logging


@contextmanager
def busy(console: Console, doing: str) -> Iterator[None]:
    """Say what is being done, in place of the bars that transformers shows for each small step."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with console.status(doing):
            yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
