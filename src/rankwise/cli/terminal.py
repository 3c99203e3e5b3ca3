"""The one way to the terminal. What files, names and other programs say is shown on it, never obeyed by it."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from itertools import accumulate
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.segment import Segment
from rich.text import Span, Text

_JOINERS = "\u200c\u200d"  # without which some scripts and emoji are not spelt right


def visible(text: str) -> str:
    r"""Text whose control characters, marks of direction and other invisible letters are spelt out.

    Lines, tabs and spaces of all scripts stay.

    >>> print(visible("\x1b[2J\u202egpj"))
    \x1b[2J\u202egpj
    """
    return text if text.isprintable() else "".join(map(_spelt, text))


def _spelt(letter: str) -> str:
    shown = letter.isprintable() or letter in "\n\t" or letter in _JOINERS or unicodedata.category(letter) == "Zs"
    return letter if shown else ascii(letter)[1:-1]


def _visible_text(text: Text) -> Text:
    plain = visible(text.plain)
    if plain == text.plain:
        return text
    starts = [0, *accumulate(len(visible(letter)) for letter in text.plain)]
    shown = text.blank_copy(plain)
    last = len(text.plain)
    shown.spans = [Span(starts[min(start, last)], starts[min(end, last)], style) for start, end, style in text.spans]
    return shown


class Terminal(Console):
    """A console that spells out what a terminal would obey. Brackets and colons mean themselves: it has no markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as the text to show, of which tables measure their columns too."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is shown, and every part of it, comes through here."""
        return super().render(_visible_text(renderable) if isinstance(renderable, Text) else renderable, options)


class CheckedStream(FileProxy):
    """Standard error, to which libraries, warnings and traces write what they read in files.

    Being what rich puts in its place during live displays, it stays there; rich's consoles write to it as well.
    """

    def __init__(self, unchecked: IO[str]) -> None:
        super().__init__(Console(), unchecked)
        self.unchecked = unchecked

    @property
    def rich_proxied_file(self) -> IO[str]:
        """What rich's consoles write to."""
        return cast(IO[str], self)

    def write(self, text: str) -> int:
        """Show a text."""
        return self.unchecked.write(visible(text))

    def flush(self) -> None:
        """Let what was written be seen."""
        self.unchecked.flush()

    def isatty(self) -> bool:
        """No: colours would be spelt out."""
        return False


def check_stderr() -> None:
    """From here on, spell out what is written to standard error."""
    if not isinstance(sys.stderr, CheckedStream):
        sys.stderr = CheckedStream(sys.stderr)


def error_terminal() -> Terminal:
    """For messages of our own on standard error, in colour."""
    return Terminal(file=sys.stderr.unchecked if isinstance(sys.stderr, CheckedStream) else sys.stderr)
