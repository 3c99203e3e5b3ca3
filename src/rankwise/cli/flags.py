"""Flags made from the recipe's schema, so that a field added there is a flag here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined

from rankwise.train.recipe import SECTIONS, Recipe, flag_value


def recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(..., overrides)` one flag per recipe field; the flags that are set arrive as `overrides`."""
    flags = _flags()

    @wraps(command)
    def with_flags(**values: Any) -> None:
        texts = {name: values.pop(name) for name in list(values) if name in flags}
        given = {name: text for name, text in texts.items() if text is not None}
        command(**values, overrides={name: _value(name, text) for name, text in given.items()})

    signature = inspect.signature(command, eval_str=True)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "overrides"]
    with_flags.__signature__ = signature.replace(parameters=[*parameters, *flags.values()])  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *flags.values()]}
    return with_flags


def _flags() -> dict[str, inspect.Parameter]:
    return {name: _flag(name, section.__doc__ or "") for section in SECTIONS for name in section.model_fields}


def _flag(name: str, panel: str) -> inspect.Parameter:
    field = Recipe.model_fields[name]
    default = "" if field.get_default() in (PydanticUndefined, None, [], {}) else f" Default: {field.default}."
    kind, metavar = (bool, None) if field.annotation is bool else (str, _metavar(field.annotation))
    option = typer.Option(help=f"{field.description}{default}", rich_help_panel=panel, metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _metavar(annotation: Any) -> str:
    """The kinds of value that a field takes, as its flag's help shows them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is Annotated:
        return _metavar(arguments[0])
    if origin in (Union, UnionType):
        return "|".join(_metavar(member) for member in arguments if member is not NoneType)
    return {str: "TEXT", int: "INTEGER", float: "NUMBER", list: "LIST", dict: "MAPPING"}.get(
        origin or annotation, "VALUE"
    )


def _value(name: str, given: str | bool) -> Any:
    return given if isinstance(given, bool) else flag_value(name, given)
