"""The exact tensors of an adapter in training: what a resumed run needs beside the portable PEFT directory.

The portable file holds effective factors; a run that started from a pair trains δ against a frozen anchor, and both
are kept here bit for bit.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted
from rankwise.errors import MissingTensor, ShapeMismatch, SpecMismatch, UnexpectedTensor
from rankwise.tensor_files import read_tensors, write_tensors

STATE = "rankwise_state.safetensors"


_SPEC = "rankwise_spec"


def _spec(model: nn.Module, name: str | None) -> str:
    adapted = Adapted.of(model)
    return json.dumps(adapted.specs[adapted.adapter_name(name)].to_dict(), sort_keys=True)


def _check_spec(path: Path, expected: str) -> None:
    with safe_open(path, framework="pt") as stream:
        found = json.loads((stream.metadata() or {}).get(_SPEC, "{}"))
    wanted = json.loads(expected)
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise SpecMismatch(
            f"{path}: was saved with {other[0]}={found.get(other[0])!r}, this adapter has {wanted[other[0]]!r}"
            f"{f' (and {len(other) - 1} more differ)' if other[1:] else ''}; go on with the spec it was trained with"
        )


def _tensors(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    adapted = Adapted.of(model)
    name = adapted.adapter_name(name)
    layers = adapted.adapter_layers(name)
    own = {f"{path}.{key}": value for path, layer in layers.items() for key, value in layer.state_dict().items()}
    return own | adapted.whole_tensors(name)


def save_state(model: nn.Module, directory: str | Path, *, name: str | None = None) -> None:
    """Write the trained tensors and anchors of an adapter to ``rankwise_state.safetensors``."""
    write_tensors(Path(directory) / STATE, _tensors(model, name), {_SPEC: _spec(model, name)})


def load_state(
    model: nn.Module, directory: str | Path, *, name: str | None = None, allow_other_spec: bool = False
) -> None:
    """Copy a saved state into the same adapter on the same model, all tensors or none.

    Args:
        allow_other_spec: take the tensors, which must fit, although the spec (a dropout, a scale) is another.

    Raises:
        BrokenFile, NonFiniteTensor: the file cannot be trusted.
        SpecMismatch: it was saved with another spec.
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
    if not allow_other_spec:
        _check_spec(path, _spec(model, name))
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])
