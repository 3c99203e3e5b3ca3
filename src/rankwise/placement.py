"""Tensors that are not in memory: those of offloaded models, and of models made on the meta device."""

from itertools import chain
from typing import Any

from rankwise.errors import AttachError


def check_in_memory(module: Any, path: str = "") -> None:
    """Refuse a module whose numbers cannot be read where it holds them.

    Args:
        path: of the module, for the error.

    Raises:
        AttachError: a parameter or buffer is on the meta device.
    """
    for name, tensor in chain(module.named_parameters(path), module.named_buffers(path)):
        if tensor.is_meta:
            raise AttachError(
                f"{name}: expected a tensor in memory, found one on the meta device: the model was offloaded "
                f"(device_map to cpu or disk, accelerate.cpu_offload) or never filled; load it without offloading, or "
                f"bring it back with accelerate.hooks.remove_hook_from_submodules(model); for inference with "
                f"offloading merge first, with keep_base=False"
            )
