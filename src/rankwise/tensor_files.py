"""Tensors in safetensors files: written whole or not at all, read one at a time, each finite."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from rankwise.algebra.precision import at_least_fp32
from rankwise.disk import write_file
from rankwise.errors import BrokenFile, MissingTensor, NonFiniteTensor, ShapeMismatch, UnexpectedTensor
from rankwise.files import tensor_entries


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, as :func:`tensor_bytes` has it.

    Raises:
        NonFiniteTensor: one holds NaN or infinity. WriteError: the system refuses. Nothing is written then.
    """
    write_file(path, tensor_bytes(path, tensors, metadata))


def tensor_bytes(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """The content of a safetensors file; tensors that are tied are in it once each.

    Args:
        path: where it is to be, for the error.

    Raises:
        NonFiniteTensor: one holds NaN or infinity.
    """
    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        if not _is_finite(tensor):
            raise NonFiniteTensor(f"{key} holds NaN or infinity, so {path} was not written; the training diverged")
        on_cpu = tensor.detach().cpu().contiguous()
        plain[key] = on_cpu.clone() if on_cpu.data_ptr() in places else on_cpu
        places.add(plain[key].data_ptr())
    return to_bytes(plain, {"format": "pt", **metadata})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, each finite.

    Raises:
        BrokenFile: absent, truncated or malformed. UnsafeFile: only a pickle is there, or a link out of the directory.
        NonFiniteTensor: NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    names = tensor_entries(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            for name in names:
                tensors[name] = stream.get_tensor(name)
                if not _is_finite(tensors[name]):
                    raise NonFiniteTensor(
                        f"{path}: {name} holds NaN or infinity; expected finite numbers: the run diverged"
                    )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # torch's of a file cut meanwhile is the last
        raise BrokenFile(f"{path}: not a whole safetensors file ({error}): fetch it again") from None
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What was written beside the tensors."""
    with safe_open(path, framework="pt") as stream:
        return stream.metadata() or {}


def check_fit(
    source: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], owner: str, hint: str
) -> None:
    """Refuse tensors that are not the expected ones by name, shape and kind of number.

    Args:
        source: the file that they are from.
        owner: whose the expected ones are; it ends the message as ``which {owner} lacks``.
        hint: what to do.

    Raises:
        MissingTensor, UnexpectedTensor, ShapeMismatch: as it says.
    """
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        raise MissingTensor(f"{source}: lacks {missing[0]} ({len(missing)} in all); {hint}")
    if unknown:
        raise UnexpectedTensor(f"{source}: has {unknown[0]} ({len(unknown)} in all), which {owner} lacks; {hint}")
    for key, tensor in expected.items():
        other = stored[key]
        if other.shape != tensor.shape or other.is_floating_point() != tensor.is_floating_point():
            raise ShapeMismatch(
                f"{source}: {key} is {tuple(other.shape)} {other.dtype}, expected {tuple(tensor.shape)} "
                f"{tensor.dtype}; {hint}"
            )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(at_least_fp32(tensor)).all())
