"""Reading and writing single files: whole or not at all, and never a pickle."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from rankwise.errors import BrokenFile, NonFiniteTensor, UnsafeFile


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file; tensors that are tied are written once each."""
    plain: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        plain[key] = own.clone() if own.data_ptr() in places else own
        places.add(plain[key].data_ptr())
    write_file(path, to_bytes(plain, {"format": "pt", **metadata}))


def write_json(path: Path, content: Any) -> None:
    """A JSON file with sorted keys."""
    write_file(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BrokenFile: absent, not UTF-8 JSON, not an object, or with a duplicate key.
    """
    if not path.is_file():
        raise BrokenFile(f"{path}: no such file; expected an adapter directory with adapter_config.json in it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BrokenFile(f"{path}: not valid JSON ({error})") from None
    except _Duplicate as error:
        raise BrokenFile(f"{path}: the key {error.args[0]!r} appears twice in one object") from None
    if not isinstance(content, dict):
        raise BrokenFile(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


class _Duplicate(Exception):
    pass


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise _Duplicate(key)
        found[key] = value
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, each finite.

    Raises:
        BrokenFile: absent, truncated or malformed. UnsafeFile: only a pickle is there.
        NonFiniteTensor: NaN or infinity.
    """
    if not path.is_file():
        pickles = [p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        if pickles:
            raise UnsafeFile(
                f"{path.parent}: holds {pickles[0]}, a pickle, which can run code when opened and is refused; "
                f"expected {path.name}: convert it with safetensors in an environment that you trust"
            )
        raise BrokenFile(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenFile(
            f"{path} ({path.stat().st_size} bytes): not a whole safetensors file ({error}); "
            f"it may be truncated, a Git LFS pointer or a renamed pickle: fetch it again"
        ) from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise NonFiniteTensor(f"{path}: {key} holds NaN or infinity; expected finite numbers: the run diverged")
    return tensors
