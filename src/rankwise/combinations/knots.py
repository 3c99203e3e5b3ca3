"""KnOTS: align changes with one SVD of them all, then join them there (Stoica 2024, arXiv 2410.19735).

    [ΔW₁ … ΔWₙ] = U Σ [V₁ᵀ … Vₙᵀ],    ΔWᵢ = U (Σ Vᵢᵀ),    ΔW = U · joined(Σ V₁ᵀ, …, Σ Vₙᵀ)

All changes share the basis U, so that what is joined entry by entry are coordinates in one basis. With factors no
matrix [out, in] is formed: U has at most Σ rᵢ columns, and the result is low-rank of itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Generator, Tensor

from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import fp32_or_finer
from rankwise.approximation import Change
from rankwise.combinations.base import Combination, check_density
from rankwise.combinations.sparse import mean_of_agreeing, smallest_kept, trimmed
from rankwise.shapes import Float


@dataclass(frozen=True)
class Knots(Combination):
    """KnOTS-TIES: TIES on Σ Vᵢᵀ.

    Attributes:
        density: share of each change's coordinates that is kept, the largest.
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        check_density("knots", self.density)

    def __call__(self, changes: Sequence[Change], generator: Generator) -> Change:
        U, coordinates = aligned(changes)
        limits = [smallest_kept(part, self.density) for part in coordinates]
        joined = mean_of_agreeing(trimmed(torch.stack(coordinates), limits))
        dtype = fp32_or_finer(reduce(torch.promote_types, map(_dtype, changes)))
        return LowRank(U.to(dtype), joined.to(dtype))


def aligned(changes: Sequence[Change]) -> tuple[Float[Tensor, "out k"], list[Float[Tensor, "k in"]]]:
    """U, and the coordinates Σ Vᵢᵀ of each change in it; in fp64, without the directions that are rounding."""
    U, S, V = _joint_svd(changes)
    real = S.amax() * torch.finfo(torch.float32).eps <= S
    coordinates = torch.split(S[real, None] * V[:, real].T, changes[0].shape[1], dim=1)
    return U[:, real], list(coordinates)


def _joint_svd(changes: Sequence[Change]) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of the changes side by side, [out, n·in]."""
    factors = [change for change in changes if isinstance(change, LowRank)]
    if len(factors) < len(changes):
        whole = [change.dense() if isinstance(change, LowRank) else change for change in changes]
        U, S, Vh = torch.linalg.svd(torch.cat([part.double() for part in whole], 1), full_matrices=False)
        return U, S, Vh.T
    B = torch.cat([change.scale * change.B.double() for change in factors], 1)
    A: Tensor = torch.block_diag(*(change.A.double() for change in factors))  # type: ignore[no-untyped-call]
    return LowRank(B, A).svd()


def _dtype(change: Change) -> torch.dtype:
    return change.B.dtype if isinstance(change, LowRank) else change.dtype
