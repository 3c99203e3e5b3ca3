"""What an adapter that stands for a larger change loses: at one site, and in all."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from rankwise.adapter import Adapter
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import fp32_or_finer
from rankwise.algebra.svd import truncated_svd
from rankwise.errors import SpecError
from rankwise.text_table import aligned

# The change of a weight, [out, in]: by its factors, or dense where no factors hold it.
Change = LowRank | Tensor

_BLOCK = 2**18  # numbers that are worked on at a time where a matrix is gone through by rows: so many stay in a cache


@dataclass(frozen=True)
class Fit:
    """How a low-rank change fits the one that it stands for.

    Attributes:
        delta: of scale 1.
        lost: ‖change − delta‖_F.
        size: ‖change‖_F.
    """

    delta: LowRank
    lost: float
    size: float

    @property
    def error(self) -> float:
        """‖change − delta‖ / ‖change‖; 0 where nothing changes."""
        return self.lost / self.size if self.size else 0.0


@dataclass(frozen=True, eq=False)
class Approximation:
    """An adapter, and how far it is from the change that it stands for.

    Attributes:
        adapter: the adapter.
        errors: site → ‖ΔW − ΔW'‖ / ‖ΔW‖ in the Frobenius norm.
        error: the same over everything that changes, √(Σ‖ΔW − ΔW'‖² / Σ‖ΔW‖²), with ``left_out`` among what is lost.
        left_out: tensors that change but that no LoRA holds, by name (norms, biases, resized tables) → ‖change‖.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    error: float
    left_out: Mapping[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers the adapter's pairs have."""
        return sum(site.delta.rank * sum(site.delta.shape) for site in self.adapter.sites.values())

    def __str__(self) -> str:
        rows = [("site", "rank", "error")]
        rows += [(path, str(site.delta.rank), f"{self.errors[path]:.2%}") for path, site in self.adapter.sites.items()]
        rows += [(name, "", "left out") for name in self.left_out]
        return f"{aligned([*rows, ('all', '', f'{self.error:.2%}')], left=1)}\n{self.parameters:,} numbers"


def approximation(
    adapter: Adapter, fits: Mapping[str, Fit], left_out: Mapping[str, float] = MappingProxyType({})
) -> Approximation:
    """The adapter that is made of these fits, with their errors."""
    outside = [size**2 for size in left_out.values()]
    lost = math.fsum([*(fit.lost**2 for fit in fits.values()), *outside])
    size = math.fsum([*(fit.size**2 for fit in fits.values()), *outside])
    errors = {path: fit.error for path, fit in fits.items()}
    return Approximation(adapter, errors, math.sqrt(lost / size) if size else 0.0, left_out)


def check_limits(what: str, rank: int | None, error: float | None) -> None:
    """Refuse a rank and an error that do not go together, or are out of range.

    Raises:
        SpecError: as it says.
    """
    if rank is not None and error is not None:
        raise SpecError(f"{what}: expected rank or error, found {rank=} and {error=}; leave one out")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise SpecError(f"{what}: expected a rank of at least 1, found {rank!r}")
    if error is not None and not 0 <= error < 1:
        raise SpecError(f"{what}: expected an error from 0 on and below 1, found {error!r}")


def fitted(change: Change, generator: Generator, rank: int | None = None, error: float | None = None) -> Fit:
    """The best change of a rank, or the one of the lowest rank whose :attr:`Fit.error` is no larger than ``error``.

    With neither, a change that has factors is kept whole. Factors are decomposed by QR in fp64, where the result is
    Eckart–Young's optimum. A dense matrix is decomposed by randomised subspace iteration
    (:func:`rankwise.algebra.svd.truncated_svd`; exact where the matrix is small), and what is then stated is the error
    of what was found, taken from the matrix itself. The rank is at least 1.
    """
    if isinstance(change, LowRank):
        return _fitted_factors(change, rank, error)
    size = norm(change)
    U, S, V = _leading(change, size, rank, error, generator)
    kept = _kept(S, size, rank, error)
    fit = _against(change, _pair(U, S, V, kept, change.dtype), size)
    while error is not None and fit.error > error and kept < len(S):  # rounding had the last word
        kept += 1
        fit = _against(change, _pair(U, S, V, kept, change.dtype), size)
    return fit


def _fitted_factors(change: LowRank, rank: int | None, error: float | None) -> Fit:
    dtype = fp32_or_finer(change.B.dtype)
    whole = rank is None and error is None
    if whole and change.rank <= min(change.shape):
        return Fit(LowRank(change.B.to(dtype) * change.scale, change.A.to(dtype)), 0.0, float(change.norm()))
    U, S, V = LowRank(change.B.double(), change.A.double(), change.scale).svd()
    size = float(S.norm())
    kept = len(S) if whole else _kept(S, size, rank, error)
    return Fit(_pair(U, S, V, kept, dtype), float(S[kept:].norm()), size)


def _leading(
    matrix: Tensor, size: float, rank: int | None, error: float | None, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """As many singular triplets as the rank asks for, or as the error does: twice as many until they are enough."""
    assert rank is not None or error is not None
    count = rank or 16
    while True:
        count = min(count, *matrix.shape)
        U, S, V = truncated_svd(matrix, count, generator)
        if error is None or count == min(matrix.shape) or _rest(S, size)[-1] <= (error * size) ** 2:
            return U, S, V
        count *= 2


def _rest(S: Tensor, size: float) -> Tensor:
    """‖M − M_k‖² for k = 1, 2, …: M_k is a projection of M, so it is ‖M‖² − Σ_{i≤k} σ_i²."""
    return size**2 - S.double().square().cumsum(0)


def _kept(S: Tensor, size: float, rank: int | None, error: float | None) -> int:
    if rank is not None:
        return min(rank, len(S))
    assert error is not None
    return min(1 + int((_rest(S, size) > (error * size) ** 2).sum()), len(S))


def _pair(U: Tensor, S: Tensor, V: Tensor, kept: int, dtype: torch.dtype) -> LowRank:
    root = S[:kept].sqrt()
    return LowRank((U[:, :kept] * root).to(dtype), (V[:, :kept] * root).T.to(dtype))


def _against(matrix: Tensor, delta: LowRank, size: float) -> Fit:
    """The fit of a pair to a dense matrix, in fp64."""
    pair = LowRank(delta.B.double(), delta.A.double())
    squares = [(matrix[rows].double() - pair.rows(rows).dense()).square().sum() for rows in row_blocks(pair.shape)]
    return Fit(delta, math.sqrt(math.fsum(map(float, squares))), size)


def norm(matrix: Tensor) -> float:
    """‖matrix‖_F, in fp64."""
    squares = (matrix[rows].double().square().sum() for rows in row_blocks(matrix.shape))
    return math.sqrt(math.fsum(map(float, squares)))


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a matrix, a few hundred thousand numbers at a time. The blocks depend on the shape alone."""
    rows = max(_BLOCK // max(math.prod(shape[1:]), 1), 1)
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def dense_rows(change: Change, rows: slice) -> Tensor:
    """Rows of a change, dense."""
    return change.rows(rows).dense() if isinstance(change, LowRank) else change[rows]
