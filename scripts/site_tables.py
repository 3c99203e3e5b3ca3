"""What the site shows of the code itself: other libraries' names, and the public names' places."""

import inspect
from types import ModuleType
from typing import Any

import rankwise as rw
from rankwise import public
from rankwise.other_names import ADAPTER, RUN


def other_names() -> str:
    """Two tables: of an adapter, and of a run."""
    of_a_run = {name: ours for name, ours in RUN.items() if name not in ADAPTER}
    return (
        f"Of an adapter, in a recipe and in `rw.LoRA`:\n\n{_names(ADAPTER)}\n\nOf a run, in a recipe:\n\n"
        f"{_names(of_a_run)}"
    )


def _names(ours: Any) -> str:
    theirs: dict[str, list[str]] = {}
    for name, here in ours.items():
        theirs.setdefault(here, []).append(f"`{name}`")
    rows = [f"| {', '.join(names)} | {_code(here)} |" for here, names in theirs.items()]
    return "\n".join(["| there | here |", "| --- | --- |", *rows])


def _code(here: str) -> str:
    """A name or a line of a recipe as code, words as words."""
    return here if " " in here and ":" not in here else f"`{here}`"


def reference() -> str:
    """Every public name once, where it is defined: what mkdocstrings is to show."""
    names = {name: getattr(rw, name) for name in public.__all__}
    sections = {"rankwise": [value for value in names.values() if not isinstance(value, ModuleType)]}
    for name, module in names.items():
        if isinstance(module, ModuleType):
            sections[f"rankwise.{name}"] = _members(module)
    first: dict[str, str] = {}
    for title, members in sections.items():
        for member in members:
            first.setdefault(f"{member.__module__}.{member.__qualname__}", title)
    parts = ([f"## {title}", *(f"::: {place}" for place in first if first[place] == title)] for title in sections)
    return "\n\n".join(line for part in parts for line in part)


def _members(module: ModuleType) -> list[Any]:
    """Its functions and classes, those too that are imported when one is first used."""
    members = [getattr(module, key) for key in _listed(module)]
    shown = [member for member in members if inspect.isclass(member) or inspect.isfunction(member)]
    return [member for member in shown if not member.__name__.endswith("Choice")]  # a recipe's words for an optimizer


def _listed(module: ModuleType) -> list[str]:
    names = [name for name, member in vars(module).items() if getattr(member, "__module__", "") == module.__name__]
    names += getattr(module, "__all__", [])
    if "__getattr__" in vars(module):
        names += inspect.getclosurevars(vars(module)["__getattr__"]).nonlocals.get("places", {})
    return [name for name in dict.fromkeys(names) if not name.startswith("_") and name.isidentifier()]
