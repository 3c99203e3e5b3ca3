"""The header of a safetensors file, read and checked before any tensor is.

The format: eight bytes with the header's length, the header (a JSON object: name → dtype, shape, where the data lies),
then the data, without gaps. A header that says anything else about the file is refused whole.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import BrokenFile
from rankwise.json_object import as_object

HEADER_LIMIT = 16 * 2**20  # bytes; the largest adapters, of mixtures of experts, have some 10 MB
_NAME_LIMIT, _PARTS_LIMIT = 1000, 24  # letters, and parts between dots, of a tensor's name
_AXES, _AXIS_LIMIT = 8, 2**31
# Bits of a number. Types that torch cannot hold are left out.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64}
_BEGINNINGS = {
    b"version https://git-lfs": "it is a Git LFS pointer, which stands for the file: run `git lfs pull`, or",
    b"PK\x03\x04": "it is a renamed pickle (a zip file): never open it; look for safetensors, or",
    b"\x80\x02": "it is a renamed pickle: never open it; look for safetensors, or",
    b"\x89HDF": "it is an HDF5 file: convert it to safetensors, or",
    b"GGUF": "it is a GGUF file: take the adapter it was made from, or",
    b"<!DO": "it is a web page: the download failed; log in,",
    b"<htm": "it is a web page: the download failed; log in,",
}


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor.

    Attributes:
        name: of the tensor.
        dtype: as safetensors names it, such as "BF16".
        shape: of the tensor.
        start, end: of its bytes in the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensor name → entry, of a file whose header and size agree.

    Raises:
        BrokenFile: it is no safetensors file, truncated, or its header is too large or contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(32)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            guess = f"its header would have {length} bytes; it may be truncated or a renamed pickle:"
            raise _broken(path, size, next((w for b, w in _BEGINNINGS.items() if start.startswith(b)), guess))
        if length > HEADER_LIMIT:
            raise _broken(path, size, f"its header has {length} bytes, more than the {HEADER_LIMIT} that are read:")
        stream.seek(8)
        text = stream.read(length)
    content = as_object(f"{path}: header", text)
    metadata = content.pop("__metadata__", {})
    entries = {name: _entry(path, name, entry) for name, entry in content.items()}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BrokenFile(f"{path}: header: __metadata__ is {_short(metadata)}; expected text for each key")
    _check_places(path, entries, size - 8 - length)
    return entries


def _broken(path: Path, size: int, what: str) -> BrokenFile:
    return BrokenFile(f"{path} ({size} bytes): not a whole safetensors file; {what} fetch it again")


def _entry(path: Path, name: str, content: Any) -> TensorEntry:
    if len(name) > _NAME_LIMIT or name.count(".") >= _PARTS_LIMIT or not name.isprintable():
        raise BrokenFile(
            f"{path}: header: {name[:80]!r} is no tensor's name; expected at most {_NAME_LIMIT} printable letters in "
            f"at most {_PARTS_LIMIT} parts"
        )
    source = f"{path}: header: {name}"
    if not isinstance(content, dict) or content.keys() != {"dtype", "shape", "data_offsets"}:
        raise BrokenFile(f"{source}: expected dtype, shape and data_offsets, found {_short(content)}; fetch it again")
    dtype, shape, offsets = content["dtype"], content["shape"], content["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise BrokenFile(f"{source}: dtype is {_short(dtype)}; expected one of {', '.join(_BITS)}")
    if not _are_sizes(shape) or len(shape) > _AXES or any(axis >= _AXIS_LIMIT for axis in shape):
        raise BrokenFile(f"{source}: shape is {_short(shape)}; expected at most {_AXES} sizes below {_AXIS_LIMIT}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise BrokenFile(f"{source}: data_offsets is {_short(offsets)}; expected where its bytes start and end")
    entry = TensorEntry(name, dtype, tuple(shape), *offsets)
    if entry.end - entry.start != entry.numbers * _BITS[dtype] // 8:
        raise BrokenFile(
            f"{source}: shape {entry.shape} of {dtype} takes {entry.numbers * _BITS[dtype] // 8} bytes, data_offsets "
            f"{offsets} span {entry.end - entry.start}; the header was tampered with or is damaged"
        )
    return entry


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_places(path: Path, entries: Mapping[str, TensorEntry], size: int) -> None:
    """The tensors lie one behind the other, from the first byte of the data to the last."""
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            kind = "overlaps the tensor before it" if entry.start < reached else "leaves bytes that belong to none"
            raise BrokenFile(
                f"{path}: header: {name} starts at byte {entry.start} of the data, which {kind} ({reached})"
            )
        reached = entry.end
    if reached != size:
        raise BrokenFile(
            f"{path} ({path.stat().st_size} bytes): not a whole safetensors file; its tensors take {reached} bytes, "
            f"{size} are there: it is truncated, or something was appended: fetch it again"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
