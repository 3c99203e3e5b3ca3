"""The matrix sign msign(M) = U Vᵀ of M = U Σ Vᵀ, and the thin SVD behind every pseudo-inverse of a pair.

Both are exact, by LAPACK's SVD. Newton–Schulz iterations (Muon's, Polar Express) are no quicker on a CPU for the
r × r and 2r × 2r matrices that are met here, and they do not tell a direction that is zero from one that is small.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.shapes import Float


@dataclass(frozen=True, eq=False)
class ThinSVD:
    """M = U diag(S) Vᵀ, with what M has lost to rounding set to zero: its columns of U and V, its S, its 1/S."""

    U: Float[Tensor, "*n m k"]
    S: Float[Tensor, "*n k"]
    V: Float[Tensor, "*n r k"]
    inverse: Float[Tensor, "*n k"]


def thin_svd(M: Float[Tensor, "*n m r"]) -> ThinSVD:
    """The SVD of a matrix, or of a batch of them, on its numerical range; k = min(m, r).

    A singular value counts as zero where it is below the largest by the rounding of M's entries, as in
    ``torch.linalg.pinv``, or so small that it has no reciprocal.

    >>> import torch
    >>> f = thin_svd(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    >>> f.S.tolist(), [round(x, 4) for x in f.inverse.tolist()]
    ([3.0, 0.0], [0.3333, 0.0])
    """
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    kind = torch.finfo(M.dtype)
    rounding = S.amax(-1, keepdim=True) * (kind.eps * max(M.shape[-2:]))
    kept = rounding.clamp_min(2 * kind.tiny) < S
    S = torch.where(kept, S, 0.0)
    inverse = torch.where(kept, S.clamp_min(kind.tiny).reciprocal(), 0.0)
    return ThinSVD(U * kept[..., None, :], S, Vh.mT * kept[..., None, :], inverse)


def msign(M: Float[Tensor, "*n m r"]) -> Float[Tensor, "*n m r"]:
    """U Vᵀ: M with its singular values set to 1, and those that are zero left at zero. msign(0) = 0.

    >>> import torch
    >>> msign(torch.tensor([[0.0, -5.0], [0.0, 0.0]])).tolist()
    [[0.0, -1.0], [0.0, 0.0]]
    """
    f = thin_svd(M)
    return f.U @ f.V.mT


def spectral_norm(M: Float[Tensor, "*n m r"]) -> Float[Tensor, "*n"]:
    """‖M‖₂, from the Gram matrix of the shorter side."""
    size = M.abs().amax((-2, -1), keepdim=True)
    unit = M / torch.where(size > 0, size, 1.0)  # so that the squares neither overflow nor vanish
    gram = unit.mT @ unit if M.shape[-2] >= M.shape[-1] else unit @ unit.mT
    norm: Tensor = torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0.0).sqrt() * size[..., 0, 0]
    return norm
