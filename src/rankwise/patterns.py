"""Which module names a regular expression matches, in bounded time whoever wrote the expression.

Python's ``re`` backtracks: ``(a+)+$`` on a name of 40 letters takes hours, and nothing in the process can stop it.
Names and alternatives of names, which nearly all patterns are, need no regular expression. One without repetition or
groups cannot backtrack and is matched here. Any other is matched by a process that is stopped after two seconds of
computing; it takes some 30 ms to start.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from rankwise.errors import TargetError
from rankwise.pattern_worker import matches

T = TypeVar("T")

SECONDS = 2.0
_CLOCK_SECONDS = 20.0  # where the computing time cannot be limited, or the machine is very busy
_WORKER = Path(__file__).with_name("pattern_worker.py")
_NAME = re.compile(r"\^?(?:[\w\-]|\\[^\w])+")  # a dot must be escaped: a bare one matches any letter
_NO_REPETITION = re.compile(r"(?:[\w\-.^$| ]|\\[^\w])*")
_WORK_HERE = 2 * 10**6  # letters of expressions × names


def matching(field: str, expression: str, names: Sequence[str]) -> set[str]:
    """The names that an expression matches whole.

    Args:
        field: where the expression stands, for the error.

    Raises:
        TargetError: it is no regular expression, or takes too long.
    """
    alternatives = _as_names(expression)
    if alternatives is not None:
        return {name.removeprefix("^") for name in alternatives}.intersection(names)
    return _run(field, {expression: expression}, names)[expression]


def matching_ends(field: str, keys: Iterable[str], names: Sequence[str]) -> dict[str, set[str]]:
    """Key of a ``rank_pattern`` → the names whose end, from a dot or their beginning on, it matches, as in PEFT.

    Raises:
        TargetError: a key is no regular expression, or takes too long.
    """
    plain = {key: alternatives for key in keys if (alternatives := _as_names(key)) is not None}
    by_end = names_by_end(names) | {f"^{name}": {name} for name in names} if plain else {}
    looked_up = {key: {name for end in ends for name in by_end.get(end, ())} for key, ends in plain.items()}
    return looked_up | _run(field, {key: rf"(.*\.)?({key})" for key in keys if key not in plain}, names)


def pattern_values(field: str, pattern: Mapping[str, T], names: Sequence[str], default: T) -> dict[str, T]:
    """Module path → the value of the first key that matches its end, as PEFT matches it.

    Raises:
        TargetError: a key is no regular expression, or takes too long.
    """
    values = dict.fromkeys(names, default)
    matched = matching_ends(field, pattern, names)
    for key in reversed(list(pattern)):  # the first one has the last word
        values |= dict.fromkeys(matched[key], pattern[key])
    return values


def check_expressions(field: str, expressions: Iterable[str]) -> None:
    """Refuse what is no regular expression.

    Raises:
        TargetError: as it says.
    """
    matching_ends(field, expressions, ())


def names_by_end(names: Iterable[str]) -> dict[str, set[str]]:
    """Last parts of names, from one part to all → the names that end so."""
    by_end: dict[str, set[str]] = {}
    for name in names:
        for end in ends_of(name):
            by_end.setdefault(end, set()).add(name)
    return by_end


def ends_of(name: str) -> list[str]:
    """``a.b.c`` → c, b.c, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts) - 1, -1, -1)]


def keys_under(kept: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The module paths (or tensors' names) that are, or lie below, a module that one of some suffixes names."""
    wanted = set(kept)
    lengths = {keep.count(".") + 1 for keep in wanted}
    return [path for path in paths if any(run in wanted for length in lengths for run in _runs(path, length))]


def _runs(path: str, length: int) -> Iterator[str]:
    """Parts of a path that follow each other; of ``a.b.c`` with length 2: a.b, b.c."""
    parts = path.split(".")
    return (".".join(parts[first : first + length]) for first in range(len(parts) - length + 1))


def _as_names(expression: str) -> list[str] | None:
    """The names that an expression is alternatives of, each with its ``^`` if it had one; None if it is more."""
    parts = expression.split("|")
    return [re.sub(r"\\(.)", r"\1", part) for part in parts] if all(map(_NAME.fullmatch, parts)) else None


def _run(field: str, expressions: dict[str, str], names: Sequence[str]) -> dict[str, set[str]]:
    """Key → the names that its expression matches whole."""
    if not expressions:
        return {}
    short = sum(map(len, expressions.values())) * (len(names) + 100) < _WORK_HERE
    if short and all(map(_NO_REPETITION.fullmatch, expressions)):
        answers = list(matches(expressions.values(), names))
    else:
        answers = _answers_of_worker(tuple(expressions.values()), tuple(names))
    matched: dict[str, set[str]] = {}
    for key, answer in zip_longest(expressions, answers):
        if answer is None:
            raise TargetError(
                f"{field} {_short(key)}: not done with {len(names)} module names after {SECONDS:g} s of computing; "
                f"expected a regular expression without repetition inside repetition, as in (a+)+: simplify it, or "
                f"give a list of names"
            )
        if isinstance(answer, str):
            raise TargetError(f"{field} {_short(key)} is not a regular expression: {answer}")
        matched[key] = {names[index] for index in answer}
    return matched


@lru_cache(maxsize=64)
def _answers_of_worker(expressions: tuple[str, ...], names: tuple[str, ...]) -> list[list[int] | str]:
    """What the worker said of each expression, up to the one at which it was stopped."""
    question = json.dumps({"expressions": expressions, "names": names, "seconds": SECONDS})
    # -I -S: nothing of the surroundings is imported, which also makes it start fast.
    command = [sys.executable, "-I", "-S", str(_WORKER)]
    try:
        done = subprocess.run(command, input=question.encode(), capture_output=True, timeout=_CLOCK_SECONDS)
        written = done.stdout
    except subprocess.TimeoutExpired as stopped:
        written = stopped.stdout or b""
    return [json.loads(line) for line in written.splitlines(keepends=True) if line.endswith(b"\n")]


def _short(expression: str) -> str:
    return repr(expression if len(expression) <= 80 else f"{expression[:77]}...")
