"""The exact tensors of an adapter in training: what a resumed run needs beside the portable PEFT directory.

The portable file holds effective factors; a run that started from a pair trains δ against a frozen anchor, and both
are kept here bit for bit.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from rankwise.errors import MissingTensor, ShapeMismatch, UnexpectedTensor
from rankwise.files import read_tensors, write_tensors
from rankwise.saved import copied_values
from rankwise.slots import adapter_layers, adapter_name

STATE = "rankwise_state.safetensors"


def _tensors(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    name = adapter_name(model, name)
    layers = adapter_layers(model, name)
    own = {f"{path}.{key}": value for path, layer in layers.items() for key, value in layer.state_dict().items()}
    return own | copied_values(model, name)


def save_state(model: nn.Module, directory: str | Path, *, name: str | None = None) -> None:
    """Write the trained tensors and anchors of an adapter to ``rankwise_state.safetensors``."""
    write_tensors(Path(directory) / STATE, _tensors(model, name), {})


def load_state(model: nn.Module, directory: str | Path, *, name: str | None = None) -> None:
    """Copy a saved state into the same adapter on the same model, all tensors or none.

    Raises:
        BrokenFile, NonFiniteTensor: the file cannot be trusted.
        MissingTensor, UnexpectedTensor, ShapeMismatch: it belongs to another adapter.
    """
    path = Path(directory) / STATE
    saved, own = read_tensors(path), _tensors(model, name)
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing:
        raise MissingTensor(f"{path}: lacks {missing[0]} ({len(missing)} in all); was it saved with another spec?")
    if extra:
        raise UnexpectedTensor(f"{path}: has {extra[0]} ({len(extra)} in all), which this adapter lacks")
    for key, tensor in own.items():
        if saved[key].shape != tensor.shape or saved[key].dtype != tensor.dtype:
            raise ShapeMismatch(
                f"{path}: {key} is {tuple(saved[key].shape)} {saved[key].dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])
