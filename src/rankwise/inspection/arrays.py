"""Tensors of a safetensors file as NumPy arrays, so that to look into a file needs no torch."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import BrokenFile, NonFiniteTensor
from rankwise.files import readable
from rankwise.tensor_header import TensorEntry

Array = NDArray[Any]

# Types that NumPy has; BF16 and the two of eight bits are decoded below.
_DTYPES = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8"}
_DTYPES |= {"I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
_CHUNK = 2**24  # bytes that are checked at a time
READ_LIMIT = 2 * 2**30  # bytes that are checked in all
_SITE_NUMBERS, _SITES_NUMBERS = 2**27, 2**29  # of one site, and of all, that are looked at
_WORK = 1e11  # multiplications for norms


class TensorFile:
    """An open safetensors file whose header was read.

    A file may claim any size and take no room on the disk: what is past the limits is not read.

    Attributes:
        unread: names of tensors past the limits.
    """

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry], stream: BinaryIO) -> None:
        self._path, self._entries, self._stream = path, entries, stream
        self._data = 8 + int.from_bytes(stream.read(8), "little")
        self._bytes_left, self._numbers_left, self._work_left = READ_LIMIT, _SITES_NUMBERS, _WORK
        self.unread: list[str] = []

    def takes_site(self, entries: Iterable[TensorEntry]) -> bool:
        """Whether a site's tensors are within the limits; they count as read then."""
        numbers = sum(entry.numbers for entry in entries)
        if numbers > min(_SITE_NUMBERS, self._numbers_left):
            self.unread.extend(entry.name for entry in entries)
            return False
        self._numbers_left -= numbers
        return True

    def takes_norm(self, B: Array, A: Array) -> bool:
        """Whether the norm of B A is within the limits; it counts as taken then."""
        work = len(A) * (A.size + B.size)
        if work > self._work_left:
            return False
        self._work_left -= work
        return True

    def array(self, name: str) -> Array:
        """A tensor; floating-point numbers in fp32 or finer.

        Raises:
            NonFiniteTensor: NaN or infinity. BrokenFile: the file cannot be read.
        """
        entry = self._entries[name]
        return self._numbers(name, entry.start, entry.end).reshape(entry.shape)

    def check_finite(self, names: Iterable[str]) -> None:
        """Read tensors of any size, a part at a time.

        Raises:
            NonFiniteTensor, BrokenFile: see :meth:`array`.
        """
        for name in names:
            entry = self._entries[name]
            self._bytes_left -= entry.end - entry.start
            if self._bytes_left < 0:
                self.unread.append(name)
                continue
            for start in range(entry.start, entry.end, _CHUNK):
                self._numbers(name, start, min(start + _CHUNK, entry.end))

    def _numbers(self, name: str, start: int, end: int) -> Array:
        dtype = self._entries[name].dtype
        try:
            self._stream.seek(self._data + start)
            numbers = _decoded(dtype, np.frombuffer(self._stream.read(end - start), _DTYPES[dtype]))
        except (OSError, ValueError) as error:
            raise BrokenFile(f"{self._path}: not a whole safetensors file ({error}): fetch it again") from None
        if not np.isfinite(numbers).all():
            raise NonFiniteTensor(
                f"{self._path}: {name} holds NaN or infinity; expected finite numbers: the run diverged"
            )
        return numbers


@contextmanager
def opened(path: Path, entries: Mapping[str, TensorEntry]) -> Iterator[TensorFile]:
    """The file of a header's entries.

    Raises:
        BrokenFile: it cannot be read.
    """
    with readable(path), path.open("rb") as stream:
        yield TensorFile(path, entries, stream)


def _decoded(dtype: str, stored: Array) -> Array:
    if dtype == "BF16":  # the upper half of an fp32 number
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":  # the upper half of an fp16 number
        return (stored.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E4M3":
        return _E4M3[stored]
    return stored.astype(np.float32) if dtype == "F16" else stored


def _e4m3() -> NDArray[np.float32]:
    """What each byte means: a sign, four bits of exponent (biased by 7), three of fraction; no infinity, one NaN."""
    codes = np.arange(256)
    exponents, fractions = (codes >> 3) & 15, codes & 7
    sizes = np.where(exponents == 0, fractions * 2.0**-9, (8 + fractions) * 2.0 ** (exponents - 10.0))
    sizes[codes & 127 == 127] = np.nan
    return np.where(codes < 128, sizes, -sizes).astype(np.float32)


_E4M3 = _e4m3()


def low_rank_norm(B: Array, A: Array, scale: float) -> float:
    """‖scale · B A‖_F = scale · √⟨BᵀB, AAᵀ⟩ of B [out, r] and A [r, in] in fp64; infinite or NaN if it overflows."""
    with np.errstate(all="ignore"):
        return scale * float(np.sqrt(max(float(np.sum(_gram(B) * _gram(A.T))), 0.0)))


def _gram(rows: Array) -> NDArray[np.float64]:
    """XᵀX of X [n, r], a part at a time."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(rows), 2**16):
        part = rows[start : start + 2**16].astype(np.float64)
        total += part.T @ part
    return total
