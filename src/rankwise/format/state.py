"""The exact tensors of an adapter in training: what a resumed run needs beside the portable PEFT directory.

The portable file holds effective factors; a run that started from a pair trains δ against a frozen anchor, and both
are kept here bit for bit.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted
from rankwise.errors import ShapeMismatch, SpecMismatch
from rankwise.format.built import layer_tensors
from rankwise.json_object import as_object
from rankwise.tensor_files import check_fit, read_metadata, read_tensors, write_tensors

STATE = "rankwise_state.safetensors"
_SPEC = "rankwise_spec"


def _state_and_spec(model: nn.Module, name: str | None) -> tuple[dict[str, Tensor], str]:
    """The adapter's own tensors, and its spec as text."""
    adapted = Adapted.of(model)
    name = adapted.adapter_name(name)
    state = layer_tensors(adapted.adapter_layers(name)) | adapted.whole_tensors(name)
    return state, json.dumps(adapted.specs[name].to_dict(), sort_keys=True)


def _check_spec(path: Path, expected: str) -> None:
    saved, wanted = as_object(f"{path}: {_SPEC}", read_metadata(path).get(_SPEC, "{}").encode()), json.loads(expected)
    other = [key for key in wanted if saved.get(key) != wanted[key]]
    if other:
        raise SpecMismatch(
            f"{path}: was saved with {other[0]}={saved.get(other[0])!r}, this adapter has {wanted[other[0]]!r}"
            f"{f' (and {len(other) - 1} more differ)' if other[1:] else ''}; go on with the spec it was trained with"
        )


def save_state(model: nn.Module, directory: str | Path, *, name: str | None = None) -> None:
    """Write the trained tensors and anchors of an adapter to ``rankwise_state.safetensors``.

    Raises:
        NonFiniteTensor: one holds NaN or infinity; nothing is written.
    """
    state, spec = _state_and_spec(model, name)
    write_tensors(Path(directory) / STATE, state, {_SPEC: spec})


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
    saved = read_tensors(path)
    state, spec = _state_and_spec(model, name)
    check_fit(path, saved, state, "this adapter", "was it saved with another spec?")
    for key, tensor in state.items():
        if saved[key].dtype != tensor.dtype:
            raise ShapeMismatch(f"{path}: {key} is {saved[key].dtype}, expected {tensor.dtype} as in training")
    if not allow_other_spec:
        _check_spec(path, spec)
    with torch.no_grad():
        for key, tensor in state.items():
            tensor.copy_(saved[key])
