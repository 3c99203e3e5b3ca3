"""Tensors that cannot be worked with where they are: offloaded, sharded, made in inference mode, nested."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.sites import base_modules


def check_in_memory(module: Any, path: str = "") -> None:
    """Refuse a module whose numbers cannot be read where it holds them.

    Args:
        path: of the module, for the error.

    Raises:
        AttachError: a parameter or buffer is on the meta device.
    """
    for name, tensor in _base_tensors(module, path):
        if tensor.is_meta:
            raise AttachError(
                f"{name}: expected a tensor in memory, found one on the meta device: the model was offloaded "
                f"(device_map to cpu or disk, accelerate.cpu_offload) or never filled; load it without offloading, or "
                f"bring it back with accelerate.hooks.remove_hook_from_submodules(model); for inference with "
                f"offloading merge first, with keep_base=False"
            )


def check_differentiable(module: Any) -> None:
    """Refuse to train a model whose tensors no gradient can pass.

    Raises:
        AttachError: a parameter or buffer was made under ``torch.inference_mode()``.
    """
    for name, tensor in _base_tensors(module):
        if tensor.is_inference():
            raise AttachError(
                f"{name}: expected a tensor that gradients can pass, found one made under torch.inference_mode(); "
                f"load the model outside of it, or load the adapter with trainable=False"
            )


def _base_tensors(module: nn.Module, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name → parameter or buffer, but for those of adapters, of which there may be thousands."""
    for inside, part in base_modules(module).items():
        for name, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None:
                yield ".".join(filter(None, (path, inside, name))), tensor


def check_output(path: str, y: Any) -> None:
    """Refuse a layer whose output is not one tensor, as those that return their bias beside it.

    Raises:
        AttachError: as it says.
    """
    if not isinstance(y, Tensor):
        raise AttachError(
            f"{path}: its forward returned a {type(y).__name__}; expected one tensor; name the layer in exclude_modules"
        )


def check_nested(module: Any, path: str, y: Any) -> None:
    """Refuse to train on nested tensors that torch's attention has no gradient for.

    Raises:
        AttachError: y is one of strided layout, and the module would get a gradient.
    """
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
    if trained and y.layout is torch.strided:
        raise AttachError(
            f"{path}: found a nested tensor, as nn.TransformerEncoder makes in evaluation mode where some of a batch "
            f"is padding; no gradient passes its attention. Call model.train(), or torch.no_grad() around the call, or "
            f"build the encoder with enable_nested_tensor=False"
        )


def is_sharded(tensor: object) -> bool:
    """Whether FSDP2 has sharded it. Imports nothing: where that module was never imported, nothing is."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def whole_tensor(tensor: Any) -> Tensor:
    """A tensor; gathered from all processes, each of which must ask for it, where FSDP2 has sharded it."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


@contextmanager
def holding(root: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these tensors in the places of the parameters of their names, for a while."""
    places = [(root.get_submodule(path), name) for path, _, name in (key.rpartition(".") for key in tensors)]
    parameters = [module._parameters[name] for module, name in places]
    try:
        for (module, name), tensor in zip(places, tensors.values(), strict=True):
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for (module, name), parameter in zip(places, parameters, strict=True):
            module._parameters[name] = parameter
