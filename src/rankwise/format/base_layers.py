"""The layers of a model that a file's sites go to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.errors import BaseMismatch
from rankwise.layers.kinds import kind_or_none
from rankwise.methods import nearest


def base_layer(modules: Mapping[str, nn.Module], path: str, where: str | Path) -> Any:
    """The layer at a site's path.

    Args:
        modules: the model's, by their paths.
        where: the file, for the error.

    Raises:
        BaseMismatch: there is none, or it cannot carry an adapter.
    """
    if path not in modules:
        raise BaseMismatch(
            f"{where}: the adapter has tensors for {path!r}, which this model lacks{nearest(path, modules)}; "
            f"it was written for another base"
        )
    if kind_or_none(modules[path]) is None:
        raise BaseMismatch(f"{where}: {path} is a {type(modules[path]).__name__} here, which carries no adapter")
    return modules[path]
