"""Which weights a change can be folded into: parameters in floating point that one module alone owns."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rankwise.layers.quantised import is_quantised


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Id of each parameter → its names, one for each module that owns it; more than one where modules share it."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # a module that stands in two places is one owner
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return owners


def why_not_writable(layer: Any, owners: Mapping[int, Sequence[str]]) -> str | None:
    """Why nothing can be folded into the layer's weight, and what would help; None where it can.

    Args:
        owners: of the model's parameters, see :func:`parameter_owners`.
    """
    if "weight" not in layer._parameters:
        return (
            "its weight is computed from other tensors (spectral_norm, weight_norm, pruning), which would undo the "
            "change; expected a parameter: make it one first, with torch.nn.utils.parametrize.remove_parametrizations "
            "or torch.nn.utils' remove_weight_norm, remove_spectral_norm, prune.remove"
        )
    if is_quantised(layer):
        return (
            f"its weight is quantised ({type(layer).__name__}); expected a floating point weight: load the base in "
            f"bf16 or fp32 and the adapter on top"
        )
    shared = owners[id(layer.weight)]
    return (
        f"its weight is shared by {', '.join(shared)}, and all would change; untie them first" if shared[1:] else None
    )
