"""Sign descent on the pair: every entry moves by lr, along the sign of its gradients' running mean (Bernstein 2018)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rankwise.optim.choice import choice_of
from rankwise.optim.pair_optimizer import PairOptimizer
from rankwise.pair import Pair
from rankwise.shapes import Float


def direction(
    A: Float[Tensor, "*n r in"],
    B: Float[Tensor, "*n out r"],
    grad_A: Float[Tensor, "*n r in"],
    grad_B: Float[Tensor, "*n out r"],
    scale: float,
    state: dict[str, Any],
    *,
    beta: float,
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """sign(m) with m ← βm + (1 − β)g for each half."""
    for name, gradient in (("A", grad_A), ("B", grad_B)):
        state.setdefault(name, torch.zeros_like(gradient)).lerp_(gradient, 1 - beta)
    return state["A"].sign(), state["B"].sign()


class SignDescent(PairOptimizer):
    """Every entry moves by lr (Bernstein 2018, arXiv 1802.04434).

    Args:
        beta: of the running mean; 0 is plain sign descent.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        lr: float = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
    ) -> None:
        super().__init__(pairs, direction, {"beta": beta}, lr=lr, weight_decay=weight_decay, others=others)


SignDescentChoice = choice_of(SignDescent)
