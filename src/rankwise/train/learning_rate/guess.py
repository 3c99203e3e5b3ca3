"""A first guess of a run's learning rate: which of the rules apply to an adapter at its start, with its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import geometric_mean, median

import torch
from torch import Tensor, nn

from rankwise.optim import OptimizerMethod
from rankwise.pair import Pair, pairs
from rankwise.sites import Site
from rankwise.train.learning_rate import rules
from rankwise.train.learning_rate.rules import Rule


def first_guess(
    model: nn.Module,
    sites: Sequence[Site],
    method: OptimizerMethod,
    optimizer: Callable[[float], torch.optim.Optimizer],
    steps: int,
) -> list[Rule]:
    """The rules whose product is the guess.

    Args:
        model: which carries the adapter at its start.
        sites: where.
        method: the optimizer's row.
        optimizer: rate → the optimizer of all that is trained.
        steps: of the run.
    """
    width = median(site.shape[1] for site in sites)
    rank, scale = (geometric_mean(getattr(site, field) for site in sites) for field in ("rank", "scale"))
    if method.rate_unit == "distance":
        return [rules.distance(method.learning_rate, width), rules.distance_rank(rank)]
    full = rules.full_fine_tuning(width)
    if method.rate_unit == "weight":
        return [full]
    start = pairs(model)
    if start and all(_rms(pair.A) > 0 and _rms(pair.B) > 0 for pair in start):
        sizes = (geometric_mean(map(_rms, half)) for half in ([p.A for p in start], [p.B for p in start]))
        chosen = [full, rules.anchored_start(rank, scale, *sizes)]
    else:
        chosen = [full, rules.lora_over_full(steps), rules.pair_scale(rank, scale)]
    ratio = _ratio(start, optimizer(1.0))
    return chosen if ratio == 1.0 else [*chosen, rules.faster_B(ratio)]


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt())


def _ratio(start: Sequence[Pair], optimizer: torch.optim.Optimizer) -> float:
    """How many times as fast B is trained as A: the geometric mean over the pairs."""
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    ratios = [rates[id(pair.layer.lora_B)] / rates[id(pair.layer.lora_A)] for pair in start]
    return geometric_mean(ratios) if ratios else 1.0
