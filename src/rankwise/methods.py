"""Tables of methods: a literal dict from a name to what makes the method, its paper and one line on what it does.

A row names its class by text and imports it when it is first asked for, so that listing methods, or refusing a name
that no table has, needs neither torch nor any method's file.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import import_module
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rankwise.errors import SpecError


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        make: ``"module:Class"`` of a frozen dataclass whose fields are the method's options, all with defaults; a
            module that begins with a dot is rankwise's own.
        paper: where the method comes from.
        summary: one line on what it does.
    """

    make: str
    paper: str
    summary: str

    @property
    def cls(self) -> type[Any]:
        """The class behind ``make``, imported."""
        cls: type[Any] = imported(self.make)
        return cls

    def makes(self, method: object) -> bool:
        """Whether ``method`` is an object of this row's class. Imports nothing."""
        cls = type(method)
        return absolute(self.make) == f"{cls.__module__}:{cls.__qualname__}"


def absolute(place: str) -> str:
    """``module:name`` with the module's whole name."""
    return f"rankwise{place}" if place.startswith(".") else place


def imported(place: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = absolute(place).partition(":")
    return getattr(import_module(module), name)


Table = Mapping[str, Method]
Row = TypeVar("Row")


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` when a known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def row(table: Mapping[str, Row], name: object, what: str) -> Row:
    """The row of that name. Imports nothing.

    Raises:
        SpecError: the table has no such name (the nearest one is offered).
    """
    if not isinstance(name, str) or name not in table:
        raise SpecError(f"{what}: expected one of {', '.join(table)}, found {name!r}{nearest(str(name), table)}")
    return table[name]


def resolve(table: Table, choice: Any, what: str) -> Any:
    """The method object for a name, a plain mapping ``{"name": ..., option: value}``, or the object itself.

    Raises:
        SpecError: an unknown name or option (the nearest known one is offered).
    """
    if isinstance(choice, str):
        choice = {"name": choice}
    if isinstance(choice, Mapping):
        return _build(table, dict(choice), what)
    if any(method.makes(choice) for method in table.values()):
        return choice
    raise SpecError(f"{what}: expected one of {sorted(table)} or an object from that table, found {choice!r}")


def _build(table: Table, options: dict[str, Any], what: str) -> Any:
    name = options.pop("name", None)
    cls = row(table, name, what).cls
    defaults, kinds = cls(), get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for key, value in options.items():
        if key not in known:
            raise SpecError(f"{what} {name!r}: unknown option {key!r}, known: {sorted(known)}{nearest(key, known)}")
        default = getattr(defaults, key)
        if not (_alike(value, default) or value in _literals(kinds[key])):
            raise SpecError(f"{what} {name!r}: {key} must be of the kind of {default!r}, found {value!r}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})


def _alike(value: object, default: object) -> bool:
    """Whether a plain value may stand where this default does: the same kind of number, as many of them, or text."""
    if isinstance(default, float):
        return type(value) in (int, float)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and len(value) == len(default) and all(map(_alike, value, default))
    return not isinstance(default, int | str) or type(value) is type(default)


def _literals(kind: Any) -> tuple[Any, ...]:
    """The values that a type names: of ``float | Literal["derived"]``, "derived"."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(value for member in members if get_origin(member) is Literal for value in get_args(member))


def name_of(table: Table, method: Any) -> str:
    """The table's name for a method object."""
    return next(name for name, entry in table.items() if entry.makes(method))


def as_plain(table: Table, method: Any) -> str | dict[str, Any]:
    """Plain data for a method object: its name, or a mapping where options differ from the defaults."""
    assert is_dataclass(method) and not isinstance(method, type)
    name = name_of(table, method)
    defaults = asdict(table[name].cls())
    changed = {key: value for key, value in asdict(method).items() if value != defaults[key]}
    return {"name": name, **changed} if changed else name


def lazy_attributes(package: str, table: Table, others: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that finds the classes of a table, and their modules, where they are defined.

    Args:
        package: its name, for the error.
        others: name → ``"module:name"`` of what is in no row.
    """
    places = {entry.make.rpartition(":")[2]: entry.make for entry in table.values()} | dict(others)
    modules = {absolute(place).partition(":")[0] for place in places.values()}
    submodules = {module.rpartition(".")[2]: module for module in modules if module.startswith(f"{package}.")}

    def attribute(name: str) -> Any:
        if name in submodules:
            return import_module(submodules[name])
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return imported(places[name])

    return attribute
