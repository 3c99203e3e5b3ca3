"""An adapter as layers for one model, on their way from it to a file or back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankwise.errors import BaseMismatch
from rankwise.layers.kinds import kind_or_none
from rankwise.methods import nearest
from rankwise.spec import LoRA
from rankwise.variants.base import AdapterLayer


@dataclass(frozen=True, eq=False)
class BuiltAdapter:
    """An adapter as layers that were made for one model.

    Attributes:
        layers: site → its layer.
        whole: the tensors of modules trained whole, by their names in the model.
        base_probe, base_model, base_quantised: see :class:`rankwise.adapter.Adapter`.
    """

    spec: LoRA
    layers: Mapping[str, AdapterLayer]
    whole: Mapping[str, Tensor]
    base_probe: Mapping[str, tuple[float, ...]]
    base_model: str | None = None
    base_quantised: bool = False


def layer_tensors(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """``<module path>.<name in the layer>`` → tensor, the layer's own."""
    return {f"{path}.{key}": tensor for path, layer in layers.items() for key, tensor in layer.state_dict().items()}


def base_layer(modules: Mapping[str, nn.Module], path: str, source: Path) -> Any:
    """The layer at a site's path.

    Args:
        modules: the model's, by their paths.
        source: the file, for the error.

    Raises:
        BaseMismatch: there is none, or it cannot carry an adapter.
    """
    if path not in modules:
        raise BaseMismatch(
            f"{source}: the adapter has tensors for {path!r}, which this model lacks{nearest(path, modules)}; "
            f"it was written for another base"
        )
    if kind_or_none(modules[path]) is None:
        raise BaseMismatch(f"{source}: {path} is a {type(modules[path]).__name__} here, which carries no adapter")
    return modules[path]
