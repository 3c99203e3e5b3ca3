"""A matrix's leading or last singular triplets."""

import torch
from torch import Generator, Tensor

from rankwise.shapes import Float


def truncated_svd(
    matrix: Float[Tensor, "out in"], k: int, generator: Generator, *, oversample: int = 10, iterations: int = 6
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
    """The k leading singular triplets: U [out, k], S [k], V [in, k].

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) with its own generator, so the
    result does not depend on the global random state; exact when the matrix is small or k is a large part of it.
    """
    width = min(k + max(oversample, k), *matrix.shape)
    if min(matrix.shape) <= max(2 * width, 128):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return _with_fixed_signs(u[:, :k], s[:k], vh[:k].T)
    # Random numbers come from the CPU so that every device sees the same start.
    probe = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    q = torch.linalg.qr(matrix @ probe).Q
    for _ in range(iterations):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return _with_fixed_signs((q @ u)[:, :k], s[:k], vh[:k].T)


def _with_fixed_signs(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each v's largest entry made positive: an SVD leaves the signs open, and rounding would otherwise choose them."""
    largest = v.gather(0, v.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(v.dtype)
    return u * sign, s, v * sign


def smallest_svd(
    matrix: Float[Tensor, "out in"], k: int
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
    """The k last singular triplets: U [out, k], S [k] descending, V [in, k].

    A whole SVD: nothing quicker finds them.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, -k:], s[-k:], vh[-k:].T
