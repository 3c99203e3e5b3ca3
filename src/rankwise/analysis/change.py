"""What an adapter's change does to a weight: its size, what storing the sum would lose, and directions that are new."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.algebra.svd import truncated_svd
from rankwise.errors import SpecError
from rankwise.methods import row
from rankwise.shapes import Float

_ROWS_OF = 2**18  # numbers that are folded at a time


def relative_size(delta: LowRank, weight: Float[Tensor, "out in"]) -> float:
    """‖ΔW‖_F / ‖W‖_F.

    Raises:
        SpecError: shapes that do not fit.
    """
    check_fits("relative_size", delta, weight)
    norm = float(torch.linalg.matrix_norm(weight.detach().float()))
    return float(delta.norm()) / norm if norm else float("inf")


# 16 levels of the 4-bit NormalFloat: quantiles of a Gaussian, scaled to [−1, 1] (Dettmers 2023, arXiv 2305.14314,
# appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF4_BLOCK = 64


_HALF = 127.5  # bins in each half of [−1, 1], narrower than any two levels are apart


@cache
def _nf4_tables() -> tuple[Tensor, Tensor, Tensor]:
    """The levels; bin → how many borders between levels lie below it; bin → the border within it, or infinity.

    A look-up and one comparison take half the time of comparing with all fifteen borders.
    """
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    borders = (levels[1:] + levels[:-1]) / 2
    lower = torch.arange(2 * _HALF + 1, dtype=torch.float64)[:, None] / _HALF - 1
    within = (borders >= lower) & (borders < lower + 1 / _HALF)
    return levels, (borders < lower).sum(1), torch.where(within, borders, torch.inf).amin(1)


def _nf4(matrix: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
    """Quantised to NF4 in blocks of 64, each with its own largest value, and back."""
    flat = matrix.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
    largest = padded.abs().amax(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    scaled = (padded / largest).flatten()
    levels, below, border = (table.to(matrix) for table in _nf4_tables())
    bins = ((scaled + 1) * _HALF).int()
    nearest_level = below.index_select(0, bins) + (scaled > border.index_select(0, bins))
    rounded = levels.index_select(0, nearest_level.int()).view_as(padded) * largest
    return rounded.flatten()[: flat.numel()].view_as(matrix)


STORAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda matrix: matrix.bfloat16().to(matrix),
    "float16": lambda matrix: matrix.half().to(matrix),
    "nf4": _nf4,
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
    if storage == "nf4" and (step * weight.shape[1]) % _NF4_BLOCK:
        step = -(-step // _NF4_BLOCK) * _NF4_BLOCK  # so that pieces end where blocks do
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

    W's vectors come from the eigenvectors of the smaller of WWᵀ and WᵀW, in fp32 or finer: six times quicker than an
    SVD, at the price that directions below about 1e-3 of the largest singular value mix with each other.

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
    return int((_cosines(leading, weight).amax(1) < epsilon).sum())


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
