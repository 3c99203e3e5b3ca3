"""Run as a program of its own, so that it can be stopped: which names some regular expressions match whole.

Reads ``{"expressions": [...], "names": [...], "seconds": n}`` and writes, for each expression, one line of JSON: the
numbers of the names that match, or what is wrong with the expression.
"""

import json
import re
import signal
import sys


def main() -> None:
    """Answer one question."""
    question = json.load(sys.stdin)
    # Computing time, not time on the clock: a busy machine makes no expression pathological. The signal ends the
    # process. On Windows, which has no such timer, the caller's clock does.
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
    for expression in question["expressions"]:
        answer: list[int] | str
        try:
            compiled = re.compile(expression)
            answer = [number for number, name in enumerate(question["names"]) if compiled.fullmatch(name)]
        except (re.error, RecursionError, OverflowError) as error:
            answer = str(error)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
