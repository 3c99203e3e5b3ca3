"""What a trainer logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

History = Sequence[Mapping[str, Any]]


def points(history: History, key: str) -> tuple[list[int], list[float]]:
    """The steps and values at which a trainer logged `key`.

    >>> points([{"step": 10, "loss": 1.5}, {"step": 10, "eval_loss": 1.4}], "eval_loss")
    ([10], [1.4])
    """
    logged = [(int(row["step"]), float(row[key])) for row in history if key in row]
    return [step for step, _ in logged], [value for _, value in logged]
