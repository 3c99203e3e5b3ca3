"""LoRA+: B learns faster than A (Hayou 2024, arXiv 2402.12354). Parameter groups for any torch optimizer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from rankwise.adapted.adapted import Adapted
from rankwise.errors import AttachError, SpecError
from rankwise.optim.checks import check_number
from rankwise.optim.choice import GroupsChoice
from rankwise.variants.base import PairLayer


def derived_ratio(out: int, into: int, rank: int) -> float:
    """λ = lr(B)/lr(A) ≈ (in/out)·√(in/r), for one layer of shape [out, in].

    The derivation (Su Jianlin, 配置不同的学习率，LoRA还能再涨一点？, kexue.fm/archives/10001) in torch's orientation:

    1. *Stable numbers.* The layer adds B A x with A [r, in] and B [out, r]. For x of order 1, A x stays of order 1
       when A's entries are of size √(1/in), and B (A x) when B's are of size √(1/r). (Which half starts at zero does
       not matter; these are the sizes that training tends to.)
    2. *Equal contribution.* Adam moves each entry by its learning rate, like sign descent, so to first order the loss
       falls by lr(A)·‖g_A‖₁ + lr(B)·‖g_B‖₁. g_A = s Bᵀ G has in·r entries, each proportional to the size of B's;
       g_B = s G Aᵀ has out·r entries, each proportional to the size of A's.

    Setting lr(A) · in·r · √(1/r) = lr(B) · out·r · √(1/in) gives λ. It is consistent: under Adam the sizes of two
    parameters come to differ as their learning rates do, and √(in/r) is the ratio of the sizes in 1.

    >>> shapes = (4096, 4096), (768, 768), (11008, 4096), (4096, 11008)
    >>> [round(derived_ratio(out, into, rank=8), 1) for out, into in shapes]
    [22.6, 9.8, 8.4, 99.7]
    """
    return into / out * math.sqrt(into / rank)


def param_groups(
    model: nn.Module,
    lr: float = 2e-4,
    lr_ratio: float | str = 16,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Every trainable parameter, once, in groups for an optimizer: lr(B) = lr_ratio · lr, everything else at ``lr``.

    "Everything else" is A, a DoRA magnitude or any other tensor of an adapter, and modules that are trained whole
    (a new head). Every group has the same ``weight_decay``. It works with any torch optimizer and with schedulers
    that multiply each group's rate.

    Both halves of an embedding's pair stay at ``lr``. Its input is one-hot, so A acts by lookup, without a sum over
    ``in`` that would force its entries down to √(1/in): A is of size 1 and B of size √(1/r). Only the columns of the
    tokens in a batch have a gradient, so equal contribution asks for λ = (distinct tokens/out)/√r, which depends on the
    batch and is near 1 (2,000 tokens, out = 768, r = 8: 0.9): no reason to speed either half up.

    Args:
        lr_ratio: λ, one number for all layers (the paper's default is 16), or "derived": :func:`derived_ratio` of
            each layer's own shape.

    Returns:
        Groups with the keys ``name``, ``params``, ``lr``, ``weight_decay``; layers with equal rates share one.

    Raises:
        SpecError: a learning rate, ratio or decay out of range; a ratio where there is no pair.
        AttachError: the model carries no adapter, or nothing of it is trainable.

    >>> import torch, rankwise as rw
    >>> model = rw.attach(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)), rw.LoRA(rank=2))
    >>> [(group["name"], group["lr"], len(group["params"])) for group in rw.param_groups(model, lr=1e-4)]
    [('all but B', 0.0001, 2), ('B × 16', 0.0016, 2)]
    >>> optimizer = torch.optim.AdamW(rw.param_groups(model, lr=1e-4, lr_ratio="derived"))
    """
    check_number("lr", lr, above_zero=True)
    check_number("weight_decay", weight_decay, above_zero=False)
    if lr_ratio != "derived":
        check_number("lr_ratio ('derived', or a number such as 16)", lr_ratio, above_zero=True)
    ratios = _ratios(Adapted.of(model), lr_ratio)
    if lr_ratio != 1 and not any(isinstance(layer, PairLayer) for layer in _layers(Adapted.of(model))):
        raise SpecError(f"lr_ratio: expected a layer with a pair, whose B it speeds up, found none and {lr_ratio!r}")
    members: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault(ratios.get(id(parameter), 1.0), []).append(parameter)
    if not members:
        raise AttachError(
            "no parameter of this model is trainable: activate an adapter, or load it with trainable=True"
        )
    return [
        {
            "name": "all but B" if ratio == 1.0 else f"B × {ratio:.4g}",
            "params": members[ratio],
            "lr": ratio * lr,
            "weight_decay": float(weight_decay),
        }
        for ratio in sorted(members, key=lambda ratio: (ratio != 1.0, ratio))
    ]


def _ratios(adapted: Adapted, lr_ratio: float | str) -> dict[int, float]:
    """id of each lora_B whose rate is its own → λ."""
    ratios = {}
    for layer in _layers(adapted):
        if isinstance(layer, PairLayer) and layer.site.kind != "embedding":
            out, into = layer.site.shape
            ratios[id(layer.lora_B)] = (
                derived_ratio(out, into, layer.site.rank) if lr_ratio == "derived" else float(lr_ratio)
            )
    return ratios


def _layers(adapted: Adapted) -> Iterator[nn.Module]:
    return (layer for slot in adapted.slots.values() for layer in slot.adapters.values())


@dataclass(frozen=True)
class AdamWChoice(GroupsChoice):
    """One learning rate for A and B."""

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return param_groups(model, lr, lr_ratio=1, weight_decay=weight_decay)


@dataclass(frozen=True)
class LoraPlusChoice(GroupsChoice):
    """lr(B) = ratio · lr(A); ``ratio`` a number, or "derived" from each layer's shape."""

    ratio: float | Literal["derived"] = 16.0

    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return param_groups(model, lr, lr_ratio=self.ratio, weight_decay=weight_decay)
