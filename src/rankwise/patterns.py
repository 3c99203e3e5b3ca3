"""Which module names a regular expression matches, in a bounded number of steps whoever wrote the expression.

Python's ``re`` backtracks: ``(a+)+$`` on a name of 40 letters takes hours, and nothing in the process can stop it.
Names and alternatives of names, which nearly all patterns are, need no regular expression; any other is read by
:mod:`rankwise.automaton`, which does not backtrack.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from rankwise.automaton import STEPS, TooLong, matches
from rankwise.errors import TargetError

T = TypeVar("T")

_NAME = re.compile(r"\^?(?:[\w\-]|\\[^\w])+")  # a dot must be escaped: a bare one matches any letter


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


_FIRST_INDEX = r".*?\.[^.]*\."  # PEFT's way to the first number in a path where no list is named


def in_layers(paths: Iterable[str], layers: Collection[int], lists: Iterable[str], exact: Iterable[str]) -> set[str]:
    """The module paths that are in one of the numbered layers, as PEFT's ``layers_to_transform`` tells.

    Args:
        lists: names of the lists of layers (``layers_pattern``); none: the first number in a path counts.
        exact: whole paths, which need no number.
    """
    beginnings = [rf"(?:^|.*?\.){re.escape(name)}\." for name in lists] or [_FIRST_INDEX]
    whole = set(exact)
    return {path for path in paths if path in whole or layer_number(path, beginnings) in layers}


def in_every_layer(
    paths: Sequence[str], layers: Collection[int], lists: Sequence[str], exact: Iterable[str]
) -> list[str]:
    """Like :func:`in_layers`, in the paths' order.

    Raises:
        TargetError: one of the numbers means none of them.
    """
    for number in layers:
        if not in_layers(paths, [number], lists, ()):
            raise TargetError(
                f"layers_to_transform: expected layers with targets in them, found none in layer {number}; the first "
                f"target is {paths[0]}, the last {paths[-1]}"
            )
    meant = in_layers(paths, layers, lists, exact)
    return [path for path in paths if path in meant]


def layer_number(path: str, beginnings: Sequence[str] = (_FIRST_INDEX,)) -> int | None:
    """The number of the layer that a module belongs to, after one of these beginnings; None outside of all."""
    matches = (re.match(rf"{beginning}(\d+)\.", path) for beginning in beginnings)
    return next((int(match[1]) for match in matches if match), None)


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
    try:
        answers = _answers(tuple(expressions.values()), tuple(names))
    except TooLong as stopped:
        key = list(expressions)[stopped.args[0]]
        raise TargetError(
            f"{field} {_short(key)}: not done with {len(names)} module names after {STEPS:,} steps; expected an "
            "expression with fewer or smaller repetitions, as in a{9}{9}{9}: simplify it, or give a list of names"
        ) from None
    matched: dict[str, set[str]] = {}
    for key, answer in zip(expressions, answers, strict=True):
        if isinstance(answer, str):
            raise TargetError(f"{field} {_short(key)} is not a regular expression: {answer}")
        matched[key] = {names[index] for index in answer}
    return matched


@lru_cache(maxsize=64)
def _answers(expressions: tuple[str, ...], names: tuple[str, ...]) -> list[list[int] | str]:
    return list(matches(expressions, names))


def _short(expression: str) -> str:
    return repr(expression if len(expression) <= 80 else f"{expression[:77]}...")
