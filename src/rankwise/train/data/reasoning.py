"""`reasoning-gym/NAME`: questions that the package reasoning-gym makes, each with an answer that can be checked."""

from __future__ import annotations

from typing import Any

from rankwise.errors import DataError

PREFIX = "reasoning-gym/"
_SIZES = {False: 1000, True: 100}  # trained on, and held out, from another seed


def reasoning_records(source: str, *, held_out: bool) -> list[dict[str, Any]]:
    """The questions of a task.

    Raises:
        DataError: the package is not there, or has no such task.
    """
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise DataError(
            f"{source}: expected the package reasoning-gym, which makes the questions, found it not installed. "
            "Run: pip install 'rankwise[rl]'"
        ) from error
    try:
        entries = reasoning_gym.create_dataset(source.removeprefix(PREFIX), size=_SIZES[held_out], seed=int(held_out))
    except ValueError as error:
        raise DataError(f"{source}: expected the name of a task of reasoning-gym, found: {error}") from error
    return [
        {"prompt": entry["question"] + "\n", "answer": str(entry["answer"]), "metadata": entry["metadata"]}
        for entry in entries
    ]
