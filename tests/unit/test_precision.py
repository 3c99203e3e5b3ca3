"""At least fp32, whatever a tensor is stored in."""

import pytest
import torch

from rankwise.algebra.precision import at_least_fp32, fp32_or_finer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_types_are_promoted_as_torch_does(dtype: torch.dtype) -> None:
    assert fp32_or_finer(dtype) == torch.promote_types(dtype, torch.float32)


def test_float8_which_torch_does_not_promote() -> None:
    values = torch.tensor([0.5, -2.0])
    assert torch.equal(at_least_fp32(values.to(torch.float8_e4m3fn)), values)


def test_a_tensor_that_is_fine_already_is_not_copied() -> None:
    values = torch.ones(2, dtype=torch.float64)
    assert at_least_fp32(values) is values
