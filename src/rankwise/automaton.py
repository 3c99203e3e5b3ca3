"""Regular expressions without backtracking: which strings they match whole, in a counted number of steps.

An expression becomes a graph of states (Thompson 1968, "Regular expression search algorithm"), and a string is read
letter by letter with the set of all states that are reached. Whoever wrote the expression, the steps are bounded by
its length times the strings', and their number depends on nothing else: not on the machine, nor how busy it is.
Python's ``re``, which would backtrack, is asked what one letter or one place matches, so that each flag and class means
the same.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from re import _compiler, _parser  # type: ignore[attr-defined]
from typing import Any

STEPS = 10**7
_STATES = 50_000  # of one expression; a{1000} has a thousand
_STEPS_A_LETTER, _STEPS_A_CONDITION = 20, 40  # of an expression, to read it; of a name, to look around in
_ALPHABETS = int(re.ASCII | re.LOCALE | re.UNICODE)  # of which one is in force

Test = Callable[[str, int], bool]


class TooLong(Exception):
    """More states or steps than are taken; its argument is the number of the expression at which that was so."""


def matches(expressions: Iterable[str], names: Iterable[str]) -> Iterator[list[int] | str]:
    """For each expression the numbers of the names that it matches whole, or what is wrong with it.

    Raises:
        TooLong: more than :data:`STEPS` steps, of all expressions together.
    """
    names, budget = list(names), [STEPS]
    for place, expression in enumerate(expressions):
        try:
            automaton = _read(expression, budget)
            yield [number for number, name in enumerate(names) if automaton.matches_whole(name)]
        except (re.error, RecursionError, OverflowError) as error:
            yield str(error)
        except TooLong:
            raise TooLong(place) from None


def _read(expression: str, budget: list[int]) -> "_Automaton":
    budget[0] -= _STEPS_A_LETTER * len(expression)
    if budget[0] < 0:
        raise TooLong
    with warnings.catch_warnings(action="ignore"):  # of what a later Python may read otherwise
        re.compile(expression)  # which says what is wrong with it
        tree = _parser.parse(expression)
    return _Automaton(tree, tree.state.flags, budget)


class _Automaton:
    """The states of an expression: 0 is the first, and each leads on freely, under a condition, or by a letter."""

    def __init__(self, tree: Any, flags: int, budget: list[int]) -> None:
        self._budget = budget
        self._free: list[list[tuple[Test | None, int]]] = [[]]
        self._letters: dict[int, tuple[Any, int]] = {}
        self._next: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._last = self._sequence(tree, flags, 0)

    def matches_whole(self, text: str) -> bool:
        """Whether the expression matches a text from its beginning to its end."""
        return len(text) in self._ends(text, 0)

    def _ends(self, text: str, start: int) -> Iterator[int]:
        """The places at which a match that starts at one can end."""
        states, _ = self._reached({0}, text, start)
        for place in range(start, len(text) + 1):
            if self._last in states:
                yield place
            if place == len(text) or not states:
                return
            states = self._step(states, text, place)

    def _step(self, states: frozenset[int], text: str, place: int) -> frozenset[int]:
        """The states behind the letter at a place. Where no condition is met they depend on the letter alone."""
        key = (states, text[place])
        if key in self._next:
            self._budget[0] -= 1
            return self._next[key]
        self._spend(len(states))
        letters = [self._letters[state] for state in states if state in self._letters]
        behind = {state for letter, state in letters if letter.fullmatch(text[place])}
        reached, always = self._reached(behind, text, place + 1)
        if always:
            self._next[key] = reached
        return reached

    def _reached(self, states: set[int], text: str, place: int) -> tuple[frozenset[int], bool]:
        """These states and those that they lead to without a letter, and whether under no condition."""
        waiting, always = list(states), True
        while waiting:
            for test, state in self._free[waiting.pop()]:
                if test is not None:
                    always = False
                    self._spend(_STEPS_A_CONDITION)
                if state not in states and (test is None or test(text, place)):
                    states.add(state)
                    waiting.append(state)
        self._spend(len(states))
        return frozenset(states), always

    def _spend(self, steps: int) -> None:
        self._budget[0] -= steps
        if self._budget[0] < 0:
            raise TooLong

    # Building: each method puts states behind `start` and returns the last of them.

    def _new(self) -> int:
        if len(self._free) >= _STATES:
            raise TooLong
        self._free.append([])
        return len(self._free) - 1

    def _join(self, start: int, end: int, test: Test | None = None) -> int:
        self._free[start].append((test, end))
        return end

    def _sequence(self, nodes: Any, flags: int, start: int) -> int:
        for operation, argument in nodes:
            start = self._node(str(operation), argument, flags, start)
        return start

    def _node(self, operation: str, argument: Any, flags: int, start: int) -> int:
        match operation:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                state, end = self._join(start, self._new()), self._new()
                letters = tuple(argument) if operation == "IN" else argument
                self._letters[state] = (_compiled(operation, letters, flags), end)
                return end
            case "AT":
                place_only = _compiled(operation, argument, flags)
                return self._join(start, self._new(), lambda text, at: place_only.match(text, at) is not None)
            case "BRANCH":
                end = self._new()
                for branch in argument[1]:
                    self._join(self._sequence(branch, flags, self._join(start, self._new())), end)
                return end
            case "SUBPATTERN":
                _, added, removed, nodes = argument
                kept = flags & ~_ALPHABETS if added & _ALPHABETS else flags
                return self._sequence(nodes, (kept | added) & ~removed, start)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, nodes = argument
                return self._repeat(least, most, nodes, flags, start)
            case "ASSERT" | "ASSERT_NOT":
                return self._join(start, self._new(), self._around(argument, flags, operation == "ASSERT"))
        raise re.error(f"{operation.lower()} is not read here; expected an expression without it")

    def _repeat(self, least: int, most: Any, nodes: Any, flags: int, start: int) -> int:
        for _ in range(least):
            start = self._sequence(nodes, flags, start)
        end = self._new()
        if most is _parser.MAXREPEAT:
            again = self._join(start, self._new())
            self._join(self._sequence(nodes, flags, again), again)
            return self._join(again, end)
        for _ in range(most - least):
            self._join(start, end)
            start = self._sequence(nodes, flags, self._join(start, self._new()))
        return self._join(start, end)

    def _around(self, argument: Any, flags: int, wanted: bool) -> Test:
        """Whether something stands, or does not stand, ahead of a place (1) or behind it (-1)."""
        direction, nodes = argument
        inner = _Automaton(nodes, flags, self._budget)
        if direction > 0:
            return lambda text, at: any(True for _ in inner._ends(text, at)) == wanted
        width = nodes.getwidth()[0]
        return lambda text, at: (at >= width and at in inner._ends(text, at - width)) == wanted


@lru_cache(maxsize=1024)
def _compiled(operation: str, argument: Any, flags: int) -> Any:
    """One letter's or place's expression, as ``re`` has it."""
    state = _parser.State()
    state.flags, state.str = flags, operation
    return _compiler.compile(_parser.SubPattern(state, [(getattr(_parser, operation), argument)]), flags)
