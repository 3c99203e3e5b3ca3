"""What weights in few bits can be: levels, times a scale that a group of them shares. One row a kind of storage."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankwise.algebra.precision import at_least_fp32
from rankwise.errors import MergeError
from rankwise.shapes import Float

# 16 levels of the 4-bit NormalFloat: quantiles of a Gaussian, scaled to [−1, 1] (Dettmers 2023, arXiv 2305.14314,
# appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)  # a sign, two bits of exponent, one of fraction
FP4_LEVELS = (*(-level for level in _FP4[:0:-1]), *_FP4)

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # shares of a group's own scale that are tried


@dataclass(frozen=True)
class Grid:
    """A kind of storage in few bits: each weight is one of ``levels`` times the scale of its group.

    A reader takes for a group's scale what brings its largest weight to the outermost level. A weight that is on the
    grid, with one of its group on that level, is therefore read as what it is.

    Attributes:
        levels: ascending, with 0 among them.
        group: how many numbers of a row share a scale; None: the whole row.
        read_as: the type that a reader turns the weights into first; None: their own.
        summary: who reads it, and how.
    """

    levels: tuple[float, ...]
    group: int | None
    read_as: torch.dtype | None
    summary: str

    def check(self, path: str, columns: int) -> None:
        """Refuse rows of a length that has no groups.

        bitsandbytes lets groups run on into the next row, but its kernel for CPUs (0.50) reads back something else.

        Raises:
            MergeError: as it says.
        """
        if self.group is not None and columns % self.group:
            raise MergeError(
                f"{path}: its rows of {columns} numbers do not fall into groups of {self.group}; expected a multiple: "
                f"quantise it to another kind, such as int8, which has one scale a row"
            )

    def grouped(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "n g"]:
        """A group a row, the last one filled up with zeros."""
        width = self.group or matrix.shape[1]
        return pad(matrix.flatten(), (0, -matrix.numel() % width)).view(-1, width)

    def scales(self, groups: Float[Tensor, "n g"]) -> Float[Tensor, "n 1"]:
        """What a reader takes for the groups' scales."""
        upper, lower = groups.amax(1, keepdim=True) / self.levels[-1], groups.amin(1, keepdim=True) / self.levels[0]
        return torch.maximum(upper, lower).clamp_min(torch.finfo(groups.dtype).tiny)

    def clipped_scales(
        self, groups: Float[Tensor, "n g"], importance: Float[Tensor, "n g"] | None = None
    ) -> Float[Tensor, "n 1"]:
        """Of the groups' own scales and smaller ones, those by which rounding loses least: what lies beyond is clipped.

        Args:
            importance: what a squared error of each number counts; None: 1.
        """
        own = self.scales(groups)
        best, least = own, torch.full_like(own, torch.inf)
        for clip in _CLIPS:
            errors = (self.rounded(groups, own * clip) - groups).square()
            loss = (errors if importance is None else errors * importance).sum(1, keepdim=True)
            best, least = torch.where(loss < least, own * clip, best), torch.minimum(loss, least)
        return best

    def rounded(self, values: Float[Tensor, "n g"], scales: Float[Tensor, "n 1"]) -> Float[Tensor, "n g"]:
        """The nearest values on the grids of these scales."""
        levels = torch.tensor(self.levels, dtype=values.dtype, device=values.device)
        return levels[torch.bucketize(values / scales, (levels[1:] + levels[:-1]) / 2)] * scales

    def read(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """What a reader makes of a weight, in fp32 or finer."""
        seen = at_least_fp32(weight if self.read_as is None else weight.to(self.read_as))
        groups = self.grouped(seen)
        return self.rounded(groups, self.scales(groups)).flatten()[: weight.numel()].view_as(weight)


def _integers(lowest: int, highest: int) -> tuple[float, ...]:
    return tuple(float(level) for level in range(lowest, highest + 1))


_FOUR_BIT = "bitsandbytes' {}, blocks of 64 numbers, no double quantisation"
GRIDS: dict[str, Grid] = {
    "nf4": Grid(NF4_LEVELS, 64, None, _FOUR_BIT.format("NF4")),
    "fp4": Grid(FP4_LEVELS, 64, None, _FOUR_BIT.format("FP4")),
    "int8": Grid(_integers(-127, 127), None, torch.float16, "bitsandbytes' LLM.int8, a scale a row"),
    "int4": Grid(_integers(-8, 7), 32, None, "torchao's Intx int4, PerGroup(32), SYMMETRIC_NO_CLIPPING_ERR"),
}
