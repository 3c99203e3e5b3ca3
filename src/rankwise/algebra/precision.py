"""The precision that sums, products and decompositions run in: at least fp32, whatever the tensors are stored in."""

import torch
from torch import Tensor


def fp32_or_finer(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for all else, float8 and integers too."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in :func:`fp32_or_finer` of its type; itself where it already is."""
    return tensor.to(fp32_or_finer(tensor.dtype))
