"""Tensors in safetensors files: written whole or not at all, read one at a time, each finite."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from rankwise.errors import BrokenFile, NonFiniteTensor
from rankwise.files import tensor_entries, write_file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file; tensors that are tied are written once each."""
    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        plain[key] = own.clone() if own.data_ptr() in places else own
        places.add(plain[key].data_ptr())
    write_file(path, to_bytes(plain, {"format": "pt", **metadata}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, each finite.

    Raises:
        BrokenFile: absent, truncated or malformed. UnsafeFile: only a pickle is there, or a link out of the directory.
        NonFiniteTensor: NaN or infinity.
    """
    return dict(each_tensor(path, tensor_entries(path)))


def each_tensor(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of some of a file's tensors, read one at a time, each finite.

    Raises:
        BrokenFile: the file is not what its header says. NonFiniteTensor: NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            for name in names:
                tensor = stream.get_tensor(name)
                if not _is_finite(tensor):
                    raise NonFiniteTensor(
                        f"{path}: {name} holds NaN or infinity; expected finite numbers: the run diverged"
                    )
                yield name, tensor
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenFile(f"{path}: not a whole safetensors file ({error}): fetch it again") from None


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
