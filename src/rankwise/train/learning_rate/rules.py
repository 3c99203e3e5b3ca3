"""Rules for a first guess of a learning rate. Each is a pure function of plain numbers, a factor with its reason.

A guess is the product of the factors that apply. What an optimizer's rate counts decides which (``rate_unit`` of its
row):

* entries of A and B, as AdamW moves them: full fine-tuning's rate, and from there how far LoRA's is from it;
* entries of W, as LoRA-Pro moves them: full fine-tuning's rate itself;
* a distance in W, as the spectral step has it: the row's own rate, by width and rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SHORT_RUN = 100
WIDTH_EXPONENT = 0.781


@dataclass(frozen=True)
class Rule:
    """What a rule came to.

    Attributes:
        factor: what the guess is multiplied by.
        reason: why, with the numbers that went in.
    """

    factor: float
    reason: str


def product(rules: Sequence[Rule]) -> float:
    """The guess that the rules make together."""
    return math.prod(rule.factor for rule in rules)


def full_fine_tuning(width: float) -> Rule:
    """AdamW's rate on all weights, 5e-5·(2000/n)^0.781: the fit for Llama of "LoRA Without Regret" (Schulman 2025).

    Args:
        width: n, the inputs of an adapted layer.

    >>> f"{full_fine_tuning(576).factor:.2g}"  # measured on SmolLM2-135M: 1e-4 to 1.25e-4
    '0.00013'
    """
    rate = 5e-5 * (2000 / width) ** WIDTH_EXPONENT
    return Rule(rate, f"full fine-tuning of layers with {width:g} inputs: 5e-5·(2000/n)^0.78")


def lora_over_full(steps: int) -> Rule:
    """10, and 15 in short runs: the same source, which finds the factor for every rank and model size."""
    if steps < SHORT_RUN:
        return Rule(15.0, f"LoRA in a run of less than {SHORT_RUN} steps ({steps}): 15 × full fine-tuning's")
    return Rule(10.0, "LoRA: 10 × full fine-tuning's")


def pair_scale(rank: float, scale: float) -> Rule:
    """(16/(s·r))^½. Multiplying s by q does what multiplying both rates and the start by √q does.

    So s = α/r has one rate for every rank (Schulman 2025), s = α/√r one that falls as r^-¼, and a fixed s as r^-½.

    >>> pair_scale(rank=64, scale=16 / 64).factor, pair_scale(rank=16, scale=4).factor
    (1.0, 0.5)
    """
    return Rule((16 / (scale * rank)) ** 0.5, f"rank {rank:.3g} at s = {scale:.3g}: (16/(s·r))^½")


def anchored_start(rank: float, scale: float, rms_A: float, rms_B: float) -> Rule:
    """1/(s√r·(a² + b²)^½) of full fine-tuning's, a and b the root mean squares of A₀ and B₀.

    Adam's first step moves entries of A and B by η and so those of W, whose terms add up as random signs do, by
    η·s√r·(a² + b²)^½. The rule sets that equal to what full fine-tuning's rate moves them by.
    """
    reach = scale * rank**0.5 * math.hypot(rms_A, rms_B)
    return Rule(
        1 / reach,
        f"the start (A₀ of size {rms_A:.2g}, B₀ of {rms_B:.2g}, s = {scale:.3g}, rank {rank:.3g}): an entry of W moves "
        f"{reach:.2g} times as far as those of A and B, and is to move as in full fine-tuning",
    )


def faster_B(ratio: float) -> Rule:
    """λ^-½ for LoRA+: the geometric mean of A's rate and of B's, λ times as large, is one rate's for both."""
    return Rule(ratio**-0.5, f"LoRA+: B's rate is {ratio:.3g} times A's, which is what is named: λ^-½")


def distance(rate: float, width: float) -> Rule:
    """An optimizer's own rate, that of SmolLM2-135M at rank 8 in short runs, carried to another width as AdamW's is."""
    return Rule(
        rate * (576 / width) ** WIDTH_EXPONENT,
        f"a distance in W, {rate:g} where layers have 576 inputs, for {width:g}: (576/n)^0.78",
    )


def distance_rank(rank: float) -> Rule:
    """(8/r)^⅓: the best distance falls slowly with the rank (``benchmarks/wind_tunnel.py``)."""
    return Rule((8 / rank) ** (1 / 3), f"rank {rank:.3g}: (8/r)^⅓")
