"""The run-time type checker that the tests install on every function of rankwise."""

from typing import TypeVar

from beartype import BeartypeConf, beartype

F = TypeVar("F")

# As static checkers do, take an int where a float is asked for (PEP 484's numeric tower).
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: F) -> F:
    """Check a function's annotations, but for the fields of specs and of their options.

    Those come from users, and it is rankwise itself that must refuse a wrong one, with an error of its own.
    """
    if function.__name__ == "__init__" and function.__module__.startswith(("rankwise.spec", "rankwise.inits.")):
        return function
    return _checked(function)
