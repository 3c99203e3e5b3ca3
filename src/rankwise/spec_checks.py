"""What the fields of a spec may hold, one by one and together. Nothing here needs torch."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rankwise.errors import SpecError, TargetError
from rankwise.inits import INITS
from rankwise.methods import nearest, row
from rankwise.other_names import ADAPTER, hint
from rankwise.patterns import check_expressions
from rankwise.scaling import SCALINGS
from rankwise.variants import VARIANTS

# Fields that name a method, each with its table.
METHOD_FIELDS = {"init": INITS, "scaling": SCALINGS, "variant": VARIANTS}


def checked(name: str, value: Any) -> Any:
    """The value of a field of :class:`LoRA`, made unchangeable; of one that names a method, the name alone is checked.

    Imports no method.

    Raises:
        SpecError: it is out of range, unknown, or of the wrong type.
    """
    return _CHECKS[name](name, value)


def check_names(names: Iterable[str], fields: Collection[str]) -> None:
    """Refuse what is no field of :class:`LoRA`, with the name that it has here where another library calls it so.

    Raises:
        SpecError: as it says.
    """
    for name in names:
        if name not in fields:
            raise SpecError(f"LoRA has no field {name!r}{hint(name, ADAPTER) or nearest(name, fields)}")


def _is_number(value: object) -> bool:
    # A bool is no number here, and an integer may be too large to be compared as a float.
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max


def checked_rank(name: str, value: Any) -> int:
    """A rank, or a width."""
    if type(value) is not int or value <= 0:
        raise SpecError(f"{name} must be a positive integer, found {value!r}")
    return value


def _alpha(name: str, value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise SpecError(f"{name} must be a positive finite number, found {value!r}")
    return value  # type: ignore[no-any-return]


def _dropout(name: str, value: Any) -> float:
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise SpecError(f"{name} must be at least 0 and below 1, found {value!r}")
    return value  # type: ignore[no-any-return]


def check_together(fields: Mapping[str, Any]) -> None:
    """Refuse values that are in range and do not go together.

    Raises:
        SpecError: as it says.
    """
    targets, layers, tokens = (fields[name] for name in ("target_modules", "layers_to_transform", _TOKENS))
    if layers is not None and isinstance(targets, str) and targets != "all-linear":
        raise SpecError(f"layers_to_transform goes with 'all-linear' or a list of target_modules, found {targets!r}")
    if layers is None and fields["layers_pattern"]:
        raise SpecError(f"layers_pattern {fields['layers_pattern']} says nothing without layers_to_transform")
    both = set(tokens).intersection(fields["modules_to_save"]) if isinstance(tokens, Mapping) else set()
    if both:
        raise SpecError(f"{_TOKENS} and modules_to_save both name {min(both)!r}: train its rows, or the whole of it")


def _seed(name: str, value: Any) -> int:
    if type(value) is not int:
        raise SpecError(f"{name} must be an integer, found {value!r}")
    return value


def _one_of(*known: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise SpecError(f"{name} must be one of {', '.join(known)}, found {value!r}{nearest(str(value), known)}")
        return value  # type: ignore[no-any-return]

    return check


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    """Ids, or numbers of layers, each once."""
    numbers = (value,) if type(value) is int else value
    if not isinstance(numbers, Sequence | set | frozenset) or not numbers or isinstance(numbers, str):
        raise SpecError(f"{name} must be a list of integers from 0 on, found {value!r}")
    for number in numbers:
        if type(number) is not int or number < 0:
            raise SpecError(f"{name} must be a list of integers from 0 on, found {number!r} in it")
    return tuple(dict.fromkeys(sorted(numbers) if isinstance(numbers, set | frozenset) else numbers))


def _layers(name: str, value: Any) -> tuple[int, ...] | None:
    return None if value is None else _numbers(name, value)


def _token_indices(name: str, value: Any) -> tuple[int, ...] | Mapping[str, tuple[int, ...]] | None:
    if not isinstance(value, Mapping):
        return _layers(name, value)
    if not value or not all(isinstance(key, str) and key for key in value):
        raise SpecError(f"{name} must map modules' names to lists of ids, found {value!r}")
    return MappingProxyType({key: _numbers(f"{name}[{key!r}]", ids) for key, ids in value.items()})


def _method(name: str, value: Any) -> Any:
    if isinstance(value, str):
        row(METHOD_FIELDS[name], value, name)
    elif isinstance(value, Mapping):
        row(METHOD_FIELDS[name], value.get("name"), name)
    return value


def _names(field_name: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if not value:
            raise SpecError(f"{field_name} is an empty string; name modules or leave it at its default")
        return value
    if isinstance(value, Sequence | set | frozenset) and all(isinstance(item, str) and item for item in value):
        names = sorted(value) if isinstance(value, set | frozenset) else list(value)
        if field_name == "target_modules" and not names:
            raise SpecError("target_modules is an empty list; name modules or use 'all-linear'")
        return tuple(dict.fromkeys(names))
    raise SpecError(f"{field_name} must be a string or a list of non-empty strings, found {value!r}")


def _pattern(field_name: str, value: Any, check: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecError(f"{field_name} must map a module pattern to a number, found {value!r}")
    for key, item in value.items():
        if not isinstance(key, str) or not key:
            raise SpecError(f"{field_name} key {key!r} is not a regular expression for a module's name")
        check(f"{field_name}[{key!r}]", item)
    try:
        check_expressions(f"{field_name} key", value)
    except TargetError as error:
        raise SpecError(str(error)) from None
    return MappingProxyType(dict(value))


def _name_or_names(field_name: str, value: Any) -> str | tuple[str, ...]:
    return _names(field_name, (value,) if isinstance(value, str) else value)


_TOKENS = "trainable_token_indices"
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "rank": checked_rank,
    "alpha": _alpha,
    "target_modules": _names,
    "exclude_modules": _names,
    "init": _method,
    "scaling": _method,
    "variant": _method,
    "dropout": _dropout,
    "rank_pattern": lambda name, value: _pattern(name, value, checked_rank),
    "alpha_pattern": lambda name, value: _pattern(name, value, _alpha),
    "modules_to_save": _name_or_names,
    "anchor": _one_of("frozen", "fold"),
    "seed": _seed,
    "trainable_token_indices": _token_indices,
    "bias": _one_of("none", "lora_only", "all"),
    "layers_to_transform": _layers,
    "layers_pattern": _name_or_names,
}
