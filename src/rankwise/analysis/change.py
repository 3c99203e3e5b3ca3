"""What an adapter's change does to a weight: its size, what storing the sum would lose, and directions that are new."""

from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.algebra.svd import truncated_svd
from rankwise.errors import SpecError
from rankwise.grids import GRIDS
from rankwise.methods import row
from rankwise.shapes import Float

_ROWS_OF = 2**18  # numbers that are folded at a time
_BLOCK = 64  # of NF4
_LARGE = 1024  # rows and columns from which on not all directions are looked for at once


def relative_size(delta: LowRank, weight: Float[Tensor, "out in"]) -> float:
    """‖ΔW‖_F / ‖W‖_F.

    Raises:
        SpecError: shapes that do not fit.
    """
    check_fits("relative_size", delta, weight)
    norm = float(torch.linalg.matrix_norm(weight.detach().float()))
    return float(delta.norm()) / norm if norm else float("inf")


STORAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda matrix: matrix.bfloat16().to(matrix),
    "float16": lambda matrix: matrix.half().to(matrix),
    "nf4": GRIDS["nf4"].read,
}


def merge_loss(delta: LowRank, weight: Float[Tensor, "out in"], storage: str = "bfloat16") -> float:
    """Share of ΔW that merging loses where weights are stored in few bits: ‖(Q(W + ΔW) − Q(W)) − ΔW‖_F / ‖ΔW‖_F.

    Q rounds to the storage. 0 where nothing is lost, about 1 where rounding swallows the change. At 4 bits it can be
    more: what rounding W + ΔW anew moves then exceeds the change.

    Args:
        weight: W, the base in any floating point precision.
        storage: "bfloat16", "float16" or "nf4" (blocks of 64, as bitsandbytes has them).

    Raises:
        SpecError: an unknown storage, or shapes that do not fit.
    """
    stored, squares = row(STORAGES, storage, "storage"), torch.zeros(2, dtype=torch.float64)
    check_fits("merge_loss", delta, weight)
    step = max(_ROWS_OF // weight.shape[1], 1)
    if storage == "nf4" and (step * weight.shape[1]) % _BLOCK:
        step = -(-step // _BLOCK) * _BLOCK  # so that pieces end where blocks do
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        base = weight.detach()[rows].float()
        change = delta.rows(rows).dense().to(base)
        lost = stored(base + change) - stored(base) - change
        squares += torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) ** 2 for x in (lost, change)]).cpu()
    lost_energy, energy = squares.tolist()
    return float((lost_energy / energy) ** 0.5) if energy else 0.0


def intruder_dimensions(
    delta: LowRank, weight: Float[Tensor, "out in"], k: int = 10, epsilon: float = 0.5, seed: int = 0
) -> int:
    """How many of the top k left singular vectors of W + ΔW resemble none of W's: max_i |cos(u'_j, u_i)| < ε.

    Source: Shuttleworth 2024, arXiv 2410.21228, algorithm 1. They find such directions in LoRA-tuned models and not in
    fully tuned ones, and that models with them forget more.

    Of a large W, the leading vectors alone are compared first: where they leave no direction with ε² of its length, or
    hold one that is like it, that settles it. All others come from the eigenvectors of the smaller of WWᵀ and WᵀW, in
    fp32 or finer: six times quicker than an SVD, at the price that directions below about 1e-3 of the largest singular
    value mix with each other.

    Args:
        k: leading directions of the changed weight to look at.
        epsilon: below this cosine two directions count as unlike.
        seed: of the randomised SVD of W + ΔW.

    Raises:
        SpecError: shapes that do not fit, k or ε out of range.
    """
    check_fits("intruder_dimensions", delta, weight)
    if not 1 <= k <= min(weight.shape) or not 0 < epsilon <= 1:
        raise SpecError(
            f"intruder_dimensions: expected k from 1 to {min(weight.shape)} and 0 < ε ≤ 1, found {k} and {epsilon}"
        )
    generator = torch.Generator().manual_seed(seed)
    weight = at_least_fp32(weight.detach())
    leading = truncated_svd(weight + delta.dense().to(weight), k, generator)[0]
    if min(weight.shape) >= _LARGE:
        cosines = leading.T @ truncated_svd(weight, 2 * k, generator)[0]
        rest = 1 - cosines.square().sum(1)
        leading = leading[:, (cosines.abs().amax(1) < epsilon) & (rest >= epsilon**2)]
    return int((_cosines(leading, weight).amax(1) < epsilon).sum()) if leading.shape[1] else 0


def _cosines(vectors: Float[Tensor, "out k"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "k n"]:
    """|cos| between these vectors and every left singular vector of the weight that has a singular value."""
    out, into = weight.shape
    if out <= into:
        left: Tensor = torch.linalg.eigh(weight @ weight.T)[1]
        return (vectors.T @ left).abs()
    squares, right = torch.linalg.eigh(weight.T @ weight)
    there = squares > squares[-1].clamp_min(0) * into * torch.finfo(squares.dtype).eps
    cosines: Tensor = (vectors.T @ weight) @ right[:, there] / squares[there].sqrt()  # u_i = W v_i / σ_i
    return cosines.abs()


def check_fits(what: str, delta: LowRank, weight: Float[Tensor, "out in"]) -> None:
    """Refuse a weight of another shape than the change's.

    Raises:
        SpecError: as it says.
    """
    if delta.shape != tuple(weight.shape):
        raise SpecError(f"{what}: expected a weight of delta's shape {delta.shape}, found {tuple(weight.shape)}")
