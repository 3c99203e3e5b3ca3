"""The NumPy reader says what torch says of a file's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rankwise.algebra.low_rank import LowRank
from rankwise.errors import NonFiniteTensor
from rankwise.inspection import arrays
from rankwise.inspection.arrays import low_rank_norm, opened
from rankwise.tensor_header import read_header

INTEGERS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16,
    torch.int32, torch.uint32, torch.int64, torch.uint64,
)  # fmt: skip
FLOATS = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def every_code(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a type of 8 or 16 bits; of a wider one, some of every size and sign."""
    size = dtype.itemsize
    if size <= 2:
        return torch.arange(2 ** (8 * size)).to(torch.uint8 if size == 1 else torch.uint16).view(dtype)
    torch.manual_seed(0)
    return (torch.randn(1000, dtype=torch.float64) * 10.0 ** torch.arange(-30, 30).repeat(17)[:1000]).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floating_point_numbers(dtype: torch.dtype, tmp_path: Path):
    codes = every_code(dtype)
    numbers = codes[torch.isfinite(codes.double())]
    path = tmp_path / "tensors.safetensors"
    save_file({"first": torch.ones(3), "numbers": numbers}, path)
    with opened(path, read_header(path)) as file:
        array = file.array("numbers")
    wide = torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32
    assert array.dtype == torch.empty(0, dtype=wide).numpy().dtype
    np.testing.assert_array_equal(array, numbers.to(wide).numpy())


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_whole_numbers(dtype: torch.dtype, tmp_path: Path):
    numbers = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    path = tmp_path / "tensors.safetensors"
    save_file({"numbers": numbers}, path)
    with opened(path, read_header(path)) as file:
        np.testing.assert_array_equal(file.array("numbers"), numbers.numpy())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_found_wherever_it_stands(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(arrays, "_CHUNK", 64)
    codes = every_code(dtype).double()
    bad = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), -float("inf")]
    for number in bad:
        numbers = codes[torch.isfinite(codes)].to(dtype)
        numbers[-1] = number
        path = tmp_path / "tensors.safetensors"
        save_file({"sound": torch.ones(3), "numbers": numbers}, path)
        with opened(path, read_header(path)) as file:
            file.check_finite(["sound"])
            for read in (file.array, lambda name, file=file: file.check_finite(["sound", name])):
                with pytest.raises(NonFiniteTensor, match="numbers holds NaN or infinity"):
                    read("numbers")


@given(out=st.integers(1, 9), into=st.integers(1, 9), rank=st.integers(1, 12), seed=st.integers(0, 9))
def test_norms(out: int, into: int, rank: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)
    norm = low_rank_norm(B.numpy(), A.numpy(), 0.3)
    assert norm == pytest.approx(float(LowRank(B.double(), A.double(), 0.3).dense().norm()), rel=1e-5)
