"""y += s · dropout(x) Aᵀ Bᵀ in place, with a backward pass that keeps only x and x Aᵀ.

x is the very tensor that the layer got, so layers that share an input (q, k, v) share what is kept; A and B are cast
to the compute type, x is not; a dropout mask is drawn again from its seed instead of being kept.

The backward pass can itself be differentiated (``create_graph=True``). Where a transform of ``torch.func`` or
forward-mode differentiation is active the two products are computed plainly, as under the compiler.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.shapes import Float


def add_low_rank(
    y: Float[Tensor, "*batch out"],
    x: Float[Tensor, "*batch in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "*batch out"]:
    """y + scale · dropout(x) Aᵀ Bᵀ, written into y.

    Args:
        y: what the frozen layer returned, if it is :func:`rankwise.in_place.writable`; its dtype is the compute type.
        dropout: probability of dropping an element of x; 0 outside training.
    """
    if not torch.is_grad_enabled():
        return add(y, down(x, A, y.dtype, dropout, draw_seed(dropout)), B, gain(scale, dropout))
    return _AddLowRank.apply(y, x, A, B, gain(scale, dropout), dropout, draw_seed(dropout))  # type: ignore[no-any-return, no-untyped-call]


def plain_sum(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
    """The same by plain operators on tensors of any kind, nested ones too."""
    h = F.linear(F.dropout(x.to(y.dtype), dropout), A.to(y.dtype))
    return y + F.linear(h, B.to(y.dtype)) * scale


def as_rows(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "rows n"]:
    """All but the last axis as one; a single vector is one row."""
    return x.reshape(-1, x.shape[-1])


_LANE = 2**16  # a 16-bit lane of a random word decides over one element, so p is rounded to a multiple of 1/65536


def gain(scale: float, dropout: float) -> float:
    """Inverted dropout's 1/(1 − p) folded into the scale: the mask is then 0 or 1."""
    return scale / (1.0 - round(dropout * _LANE) / _LANE)


def draw_seed(dropout: float) -> int:
    """A seed from the global CPU generator, which gradient checkpointing restores before it runs a forward again."""
    return int(torch.randint(2**31 - 1, ())) if dropout else 0


def _mask(like: Tensor, dropout: float, seed: int) -> Tensor:
    """The keep mask (0 or 1, like's shape and dtype) that belongs to a seed.

    Four elements share a 64-bit word: on a CPU four times as fast as ``bernoulli_``, and it is drawn twice a step.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    lanes = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    mask = torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.ge(lanes.view(like.shape), round(dropout * _LANE) - _LANE // 2, out=mask)  # no boolean in between


def down(x: Tensor, A: Tensor, dtype: torch.dtype, dropout: float, seed: int) -> Tensor:
    """dropout(x) Aᵀ without the gain, [tokens, r]."""
    x = x.to(dtype)
    if dropout:
        x = _mask(x, dropout, seed).mul_(x)
    return (as_rows(x) @ A.to(dtype).T).to(dtype)  # autocast may have made it narrower than y


def add(y: Tensor, h: Tensor, B: Tensor, gain: float) -> Tensor:
    """y += gain · h Bᵀ; h is [tokens, r]."""
    if not y.is_contiguous():
        y = y.contiguous()
    as_rows(y).addmm_(h, B.to(y.dtype).T, alpha=gain)
    return y


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, gain: float, dropout: float, seed: int) -> Tensor:
        h = down(x, A, y.dtype, dropout, seed)
        out = add(y, h, B, gain)
        if out is y:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x.clone() if x.is_inference() else x, h, A, B)
        ctx.constants = gain, dropout, seed
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        grads = gradients(grad_y, ctx.saved_tensors, ctx.constants, ctx.needs_input_grad[1:4])
        return grad_y, *grads, None, None, None


def gradients(
    grad_y: Tensor,
    saved: Sequence[Tensor],
    constants: tuple[float, float, int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, A and B, or None where they are not needed.

    Args:
        saved: x, x Aᵀ, A, B.
        constants: gain, dropout and its seed.
    """
    x, h, A, B = saved
    gain, dropout, seed = constants
    wants_x, wants_A, wants_B = needs
    dtype = grad_y.dtype
    if torch.is_grad_enabled():  # with create_graph; the h that was kept does not know where it comes from
        h = down(x, A, dtype, dropout, seed)
    mask = _mask(x.to(dtype), dropout, seed) if dropout and (wants_x or wants_A) else None
    rows = as_rows(grad_y)
    grad_h = (rows @ B.to(dtype)).mul_(gain)  # [tokens, r]
    grad_x = grad_A = grad_B = None
    if wants_B:
        grad_B = (h.T @ rows).mul_(gain).to(B.dtype).T  # r rows at a time: up to 3× faster than rowsᵀ h
    if wants_A:
        seen = x.to(dtype) if mask is None else x.to(dtype) * mask
        grad_A = (grad_h.T @ as_rows(seen)).to(A.dtype)
    if wants_x:
        grad_x = (grad_h @ A.to(dtype)).view(x.shape)
        grad_x = (grad_x if mask is None else grad_x.mul_(mask)).to(x.dtype)
    return grad_x, grad_A, grad_B
