"""What a sweep trains: a recipe with some fields changed, an arm for each line of a table or point of a grid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from rankwise.errors import RecipeError
from rankwise.methods import nearest
from rankwise.train import recipe as recipes
from rankwise.train.recipe import AdapterFields, OptimizerFields, Recipe
from rankwise.train.yaml_text import parse_yaml, read_yaml

Changes = Mapping[str, Any]

# What arms may have each for itself. The rest decides the base, the data or how many steps there are, and is shared.
FIELDS = (
    *AdapterFields.model_fields,
    *("init_batches", "init_method", "init_memory"),
    *OptimizerFields.model_fields,
    *("learning_rate", "rate_probe_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "adam_beta1", "adam_beta2"),
)


@dataclass(frozen=True)
class Arm:
    """One run of a sweep.

    Attributes:
        changes: the fields in which its recipe differs from the sweep's.
        recipe: as `rankwise train` would take it; its output_dir is the arm's directory.
    """

    name: str
    changes: Changes
    recipe: Recipe

    @property
    def directory(self) -> Path:
        """Where its checkpoints, adapter and report lie."""
        return Path(self.recipe.output_dir)


def chosen_arms(recipe: Recipe, directory: Path, table: Path | None, grid: Sequence[str] | None) -> list[Arm]:
    """The arms of a file or of a grid, with directories below the sweep's.

    Raises:
        RecipeError: both or neither, or what makes no arms.
    """
    if (table is None) == (not grid):
        raise RecipeError("sweep: expected either --arms FILE or --grid FIELD=VALUES, such as `--grid rank=4,8`")
    below = recipe.model_copy(update={"output_dir": str(directory)})
    return read_arms(below, table) if table is not None else grid_arms(below, grid or ())


def arms_of(recipe: Recipe, table: Mapping[str, Changes], source: str) -> list[Arm]:
    """The arms that a table of changes makes of a recipe, in its order, with directories below the recipe's.

    Args:
        source: where the table stands, for errors.

    Raises:
        RecipeError: no arm, a field that arms share, a value that no recipe takes, names that are one on disk.
    """
    if not table:
        raise RecipeError(f"{source}: expected an arm at least, found none: there is nothing to train")
    arms = [_arm(recipe, name, changes, f"{source}: arm {name!r}") for name, changes in table.items()]
    directories = [arm.directory for arm in arms]
    for arm in arms:
        if directories.count(arm.directory) > 1:
            raise RecipeError(
                f"{source}: arm {arm.name!r}: expected names that give directories of their own, found two arms for "
                f"{arm.directory}"
            )
    return arms


def _arm(recipe: Recipe, name: str, changes: Changes, source: str) -> Arm:
    for field in changes:
        if field not in FIELDS:
            shared = field in Recipe.model_fields
            reason = (
                "it decides the base, the data or the number of steps, which the arms of a sweep share: give each "
                "value a sweep of its own"
                if shared
                else f"no field that arms may change{nearest(field, FIELDS)}; they are {', '.join(FIELDS)}"
            )
            raise RecipeError(f"{source}: `{field}`: {reason}")
    own = {"output_dir": str(Path(recipe.output_dir) / _directory_name(name))}
    values = {**recipe.model_dump(exclude_defaults=True), **changes, **own}
    return Arm(name, changes, recipes.parse(values, source=source))


def _directory_name(name: str) -> str:
    """The name, with a hyphen for what a path may not hold or a shell would take apart."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip(".-") or "arm"


def read_arms(recipe: Recipe, path: Path) -> list[Arm]:
    """The arms of a YAML file: ``name: {field: value, ...}`` lines.

    Raises:
        RecipeError: it cannot be read, or an arm cannot be.
    """
    table = read_yaml(path, "An arm is a line such as `wide: {rank: 32}`.")
    for name, changes in table.items():
        if not isinstance(changes, Mapping):
            raise RecipeError(f"{path}: arm {name!r}: expected `field: value` lines, {{}} for none, found {changes!r}")
    return arms_of(recipe, {str(name): changes for name, changes in table.items()}, str(path))


def grid_arms(recipe: Recipe, axes: Iterable[str]) -> list[Arm]:
    """The arms of a grid: every combination of the values that the axes give, such as ``rank=4,8``.

    Raises:
        RecipeError: an axis that names no field or no values, or one twice; an arm that cannot be.
    """
    values: dict[str, Sequence[Any]] = {}
    for axis in axes:
        field, _, text = axis.partition("=")
        field = field.strip().replace("-", "_")
        if field in values:
            raise RecipeError(f"--grid {axis}: `{field}` is an axis already; give all its values at once")
        values[field] = _values(axis, text)
    points = [dict(zip(values, point, strict=True)) for point in product(*values.values())]
    return arms_of(recipe, {_point_name(point): point for point in points}, "--grid")


def _values(axis: str, text: str) -> Sequence[Any]:
    try:
        values = parse_yaml(f"[{text}]")
    except yaml.YAMLError as error:
        raise RecipeError(f"--grid {axis}: expected values such as `rank=4,8`, found {error}") from None
    assert isinstance(values, list)
    if not values:
        raise RecipeError(f"--grid {axis}: expected a field and its values, such as `rank=4,8`")
    for value in values:
        if values.count(value) > 1:
            raise RecipeError(f"--grid {axis}: expected each value once, found {value!r} twice")
    return values


def _point_name(point: Changes) -> str:
    shown = {field: ":".join(map(str, v.values())) if isinstance(v, dict) else v for field, v in point.items()}
    return " ".join(
        f"{field}={value:g}" if type(value) is float else f"{field}={value}" for field, value in shown.items()
    )
