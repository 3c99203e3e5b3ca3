"""y += s · dropout(x) Aᵀ Bᵀ in place for several adapters at once, each on its own rows of one batch.

With gradients: a loop over adapters in one node of autograd, which keeps x once for all of them. Without: two batched
products over stacked factors, which are the fastest where each adapter has few rows. No adapter's numbers meet the rows
of another, so one that is not finite spoils no other's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.algebra.low_rank import LowRank
from rankwise.layers.low_rank_product import add, down, draw_seed, gain, gradients
from rankwise.routing.rows import Blocks
from rankwise.shapes import Float


@dataclass(frozen=True)
class Group:
    """One adapter's rows, and its product's constants."""

    rows: slice | Tensor
    gain: float
    dropout: float
    seed: int

    @staticmethod
    def of(rows: slice | Tensor, scale: float, dropout: float) -> "Group":
        """With a dropout mask of its own."""
        return Group(rows, gain(scale, dropout), dropout, draw_seed(dropout))


def add_groups(
    y: Float[Tensor, "n *batch out"], x: Float[Tensor, "n *batch in"], groups: Sequence[tuple[Group, LowRank]]
) -> Float[Tensor, "n *batch out"]:
    """Each group's product added to its rows of y, in y's memory; the rest is left as it is."""
    factors = [factor for _, term in groups for factor in (term.A, term.B)]
    constants = [group for group, _ in groups]
    if not torch.is_grad_enabled():
        return _add_all(y, x, constants, factors)[0]
    return _AddGroups.apply(y, x, constants, *factors)  # type: ignore[no-any-return, no-untyped-call]


def _add_all(
    y: Tensor, x: Tensor, groups: Sequence[Group], factors: Sequence[Tensor]
) -> tuple[Tensor, list[Float[Tensor, "tokens r"]]]:
    """The sum, and x Aᵀ of each group."""
    out = y.contiguous()
    inner = []
    for group, A, B in zip(groups, factors[::2], factors[1::2], strict=True):
        inner.append(down(x[group.rows], A, y.dtype, group.dropout, group.seed))
        part = add(out[group.rows], inner[-1], B, group.gain)
        if not isinstance(group.rows, slice):  # a copy
            out[group.rows] = part
    return out, inner


class _AddGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, groups: Sequence[Group], *factors: Tensor) -> Tensor:
        out, inner = _add_all(y, x, groups, factors)
        if out is y:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x.clone() if x.is_inference() else x, *inner, *factors)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        x, *kept = ctx.saved_tensors
        inner, factors = kept[: len(ctx.groups)], kept[len(ctx.groups) :]
        wants_x, _, *wanted = ctx.needs_input_grad[1:]
        grad_x = torch.zeros_like(x) if wants_x else None
        grads: list[Tensor | None] = []
        for i, (group, h) in enumerate(zip(ctx.groups, inner, strict=True)):
            rows, pair = group.rows, slice(2 * i, 2 * i + 2)
            saved = x[rows], h, *factors[pair]
            constants = group.gain, group.dropout, group.seed
            part, *of_factors = gradients(grad_y[rows], saved, constants, (wants_x, *wanted[pair]))
            if grad_x is not None and part is not None:
                grad_x[rows] = part
            grads += of_factors
        return grad_y, grad_x, None, *grads


@dataclass(frozen=True)
class Stack:
    """The factors of blocks of rows, filled up with zeros to one rank, in the compute type.

    Attributes:
        A [blocks, r, in]: of each block.
        B [blocks, r, out]: transposed, with the scale.
    """

    A: Tensor
    B: Tensor

    @staticmethod
    def of(terms: Mapping[str, LowRank], names: Sequence[str], dtype: torch.dtype) -> "Stack":
        """Of the terms of these adapters, one for each block."""
        rank = max(term.A.shape[0] for term in terms.values())
        A = {name: _filled(term.A, rank, dtype) for name, term in terms.items()}
        B = {name: _filled(term.B.T * term.scale, rank, dtype) for name, term in terms.items()}
        return Stack(torch.stack([A[name] for name in names]), torch.stack([B[name] for name in names]))


def _filled(factor: Float[Tensor, "r n"], rank: int, dtype: torch.dtype) -> Float[Tensor, "rank n"]:
    return F.pad(factor.to(dtype), (0, 0, 0, rank - factor.shape[0]))


def add_stacked(
    y: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"], blocks: Blocks, stack: Stack
) -> Float[Tensor, "*batch out"]:
    """The blocks' products added to their rows of y, in y's memory; without gradients."""
    out = y.contiguous()
    y_blocks = out.view(blocks.count, -1, out.shape[-1])
    x_blocks = x.to(y.dtype).reshape(blocks.count, -1, x.shape[-1])
    A = stack.A.transpose(1, 2)
    if blocks.chosen is None:
        y_blocks.baddbmm_(torch.bmm(x_blocks, A).to(y.dtype), stack.B)
    else:
        h = torch.bmm(x_blocks[blocks.chosen], A).to(y.dtype)
        y_blocks[blocks.chosen] = torch.baddbmm(y_blocks[blocks.chosen], h, stack.B).to(y.dtype)
    return out
