"""Parameters as a step sees them: whole, and in fp32 or finer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.optim.elementwise import State
from rankwise.placement import is_sharded, whole_tensor


def wide(parameter: Tensor, state: State) -> Tensor:
    """The parameter's value in fp32 or finer: of a rounded parameter, the unrounded value (its master) in ``state``.

    An entry that the master does not round to was changed by someone else since the last step: it is taken as it is.
    """
    rounded = whole_tensor(parameter)
    value = rounded.to(torch.promote_types(rounded.dtype, torch.float32))
    master = state.get("master")
    return value if master is None else torch.where(master.to(rounded.dtype) == rounded, master, value)


def move(parameter: Tensor, value: Tensor, direction: Tensor, group: Mapping[str, Any], state: State) -> None:
    """p ← (1 − lr·weight_decay) p − lr·direction from the wide ``value`` of p, rounded once."""
    moved = value * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction
    if moved.dtype != parameter.dtype:
        state["master"] = moved
    parameter.copy_(_sharded_as(parameter, moved))


def _sharded_as(parameter: Any, value: Tensor) -> Tensor:
    """A value that every process has, in the parameter's shards."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim).redistribute(placements=parameter.placements)
