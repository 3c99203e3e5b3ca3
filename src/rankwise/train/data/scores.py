"""Scores of generated answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are the reference word for word; of labels the accuracy.

    >>> exact(["positive", "negative "], ["positive", "positive"])
    0.5
    """
    pairs = zip(answers, references, strict=True)
    return sum(answer.split() == reference.split() for answer, reference in pairs) / len(references)


def number(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers whose last number is the reference's, as GSM8K is scored.

    >>> number(["So she has 1,200 left.", "It is 7"], ["... The answer is 1200", "#### 8"])
    0.5
    """
    pairs = zip(answers, references, strict=True)
    found = [(_last_number(answer), _last_number(reference)) for answer, reference in pairs]
    return sum(answer is not None and answer == expected for answer, expected in found) / len(references)


def matthews(answers: Sequence[str], references: Sequence[str]) -> float:
    """Matthews' correlation of labels, 0 of one label alone; an answer that is no label is one more of them.

    Gorodkin's R_K, which for two labels is Matthews' φ.

    >>> matthews(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    0.5773502691896258
    """
    pairs = [(answer.strip(), reference.strip()) for answer, reference in zip(answers, references, strict=True)]
    said, meant = Counter(answer for answer, _ in pairs), Counter(reference for _, reference in pairs)
    total, right = len(pairs), sum(answer == reference for answer, reference in pairs)
    covariance = right * total - sum(said[label] * meant[label] for label in meant)
    spread = math.prod(total**2 - sum(count**2 for count in counts.values()) for counts in (said, meant))
    return covariance / math.sqrt(spread) if spread else 0.0


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact": exact,
    "matthews": matthews,
    "number": number,
}


def scores(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Those of the names."""
    return {name: SCORES[name](answers, references) for name in names}
