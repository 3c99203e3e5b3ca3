"""Checks of an optimizer's options."""

import math

from rankwise.errors import SpecError


def check_number(name: str, value: object, *, above_zero: bool) -> None:
    """Refuse anything but a finite number that is > 0, or ≥ 0 where ``above_zero`` is False.

    Raises:
        SpecError: naming the option and what was found.
    """
    expected = "a positive number" if above_zero else "a number ≥ 0"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (above_zero and value == 0):  # type: ignore[operator]
        raise SpecError(f"{name}: expected {expected}, found {value!r}")


def check_beta(name: str, value: object) -> None:
    """Refuse a decay rate of a moment that is no number in [0, 1).

    Raises:
        SpecError: naming the option and what was found.
    """
    if not _is_decay(value):
        raise SpecError(f"{name}: expected a number in [0, 1), found {value!r}")


def check_betas(betas: object) -> None:
    """Refuse anything but the decay rates of two moments, both in [0, 1).

    Raises:
        SpecError: naming what was found.
    """
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(map(_is_decay, betas))):
        raise SpecError(f"betas: expected two numbers in [0, 1), found {betas!r}")


def _is_decay(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
