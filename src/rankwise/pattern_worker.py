"""Which names some regular expressions match whole; run as a program of its own, it can be stopped.

The program reads ``{"expressions": [...], "names": [...], "seconds": n}`` and writes, for each expression, one line of
JSON: the numbers of the names that match, or what is wrong with the expression.
"""

import json
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence


def matches(expressions: Iterable[str], names: Sequence[str]) -> Iterator[list[int] | str]:
    """For each expression the numbers of the names that it matches, or what is wrong with it."""
    for expression in expressions:
        try:
            compiled = re.compile(expression)
            yield [number for number, name in enumerate(names) if compiled.fullmatch(name)]
        except (re.error, RecursionError, OverflowError) as error:
            yield str(error)


def main() -> None:
    """Answer one question."""
    question = json.load(sys.stdin)
    # Computing time, not time on the clock: a busy machine makes no expression pathological. The signal ends the
    # process. On Windows, which has no such timer, the caller's clock does.
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
    for answer in matches(question["expressions"], question["names"]):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
