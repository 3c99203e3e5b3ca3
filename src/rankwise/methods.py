"""Tables of methods: a literal dict from a name to a class, its paper and one line on what it does."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rankwise.errors import SpecError


@dataclass(frozen=True)
class Entry:
    """One line of a table. ``cls`` is a frozen dataclass whose fields are the method's options."""

    cls: type[Any]
    paper: str
    summary: str


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` when a known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def resolve(table: Mapping[str, Entry], choice: Any, what: str) -> Any:
    """The method object for a name, a plain mapping ``{"name": ..., option: value}``, or the object itself.

    Raises:
        SpecError: an unknown name or option (the nearest known one is offered).
    """
    if isinstance(choice, str):
        choice = {"name": choice}
    if isinstance(choice, Mapping):
        return _build(table, dict(choice), what)
    if any(type(choice) is entry.cls for entry in table.values()):
        return choice
    raise SpecError(f"{what}: expected one of {sorted(table)} or an object from that table, found {choice!r}")


def _build(table: Mapping[str, Entry], options: dict[str, Any], what: str) -> Any:
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in table:
        hint = nearest(str(name), table)
        raise SpecError(f"{what}: expected one of {', '.join(table)}, found {name!r}{hint}")
    cls = table[name].cls
    defaults, kinds = cls(), get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for key, value in options.items():
        if key not in known:
            raise SpecError(f"{what} {name!r}: unknown option {key!r}, known: {sorted(known)}{nearest(key, known)}")
        default = getattr(defaults, key)
        if not (_alike(value, default) or value in _literals(kinds[key])):
            raise SpecError(f"{what} {name!r}: {key} must be of the kind of {default!r}, found {value!r}")
    return cls(**options)


def _alike(value: object, default: object) -> bool:
    """Whether a plain value may stand where this default does: the same kind of number, or text."""
    if isinstance(default, float):
        return type(value) in (int, float)
    return not isinstance(default, int | str) or type(value) is type(default)


def _literals(kind: Any) -> tuple[Any, ...]:
    """The values that a type names: of ``float | Literal["derived"]``, "derived"."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(value for member in members if get_origin(member) is Literal for value in get_args(member))


def name_of(table: Mapping[str, Entry], method: Any) -> str:
    """The table's name for a method object."""
    return next(name for name, entry in table.items() if type(method) is entry.cls)


def as_plain(table: Mapping[str, Entry], method: Any) -> str | dict[str, Any]:
    """Plain data for a method object: its name, or a mapping where options differ from the defaults."""
    assert is_dataclass(method) and not isinstance(method, type)
    name = name_of(table, method)
    defaults = asdict(table[name].cls())
    changed = {key: value for key, value in asdict(method).items() if value != defaults[key]}
    return {"name": name, **changed} if changed else name
