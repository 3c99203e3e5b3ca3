"""Optimizers that know of the pair: LoRA+ parameter groups, LoRA-Pro. One file a method, one row in the table.

A row makes the optimizer's options as plain values; called with a model they build the optimizer.
"""

from dataclasses import dataclass
from typing import Literal

from rankwise.methods import Method, lazy_attributes


@dataclass(frozen=True)
class OptimizerMethod(Method):
    """A row of the table.

    Attributes:
        learning_rate: of a recipe that names none; what the optimizer itself has where ``lr`` is left out.
        rate_unit: what a step of rate 1 moves by about 1: the entries of A and B, those of W, or W in spectral norm.
    """

    learning_rate: float = 2e-4
    rate_unit: Literal["pair", "weight", "distance"] = "pair"


OPTIMIZERS: dict[str, OptimizerMethod] = {
    "adamw": OptimizerMethod(
        ".optim.lora_plus:AdamWChoice", "arXiv 1711.05101", "torch's AdamW on the pairs: the default"
    ),
    "lora-plus": OptimizerMethod(
        ".optim.lora_plus:LoraPlusChoice", "arXiv 2402.12354", "AdamW with a larger learning rate for B than for A"
    ),
    "lora-pro": OptimizerMethod(
        ".optim.lora_pro:LoraProChoice",
        "arXiv 2407.18242",
        "moves the pair so that the weight moves as full fine-tuning would move it",
        1e-4,
        "weight",
    ),
    "spectral": OptimizerMethod(
        ".optim.spectral:SpectralChoice",
        "arXiv 2507.12142",
        "Muon's step in the space of what the pair can do to the weight, for both halves at once",
        0.03,
        "distance",
    ),
    "polora": OptimizerMethod(
        ".optim.polora:PoloraChoice",
        "arXiv 2607.17620",
        "a polar step for each half, behind row and column scales",
        0.1,
        "distance",
    ),
    "lora-muon": OptimizerMethod(
        ".optim.lora_muon:LoraMuonChoice",
        "arXiv 2606.12921",
        "Muon's step for each half, measured in the weight",
        0.1,
        "distance",
    ),
    "scaled-adam": OptimizerMethod(
        ".optim.scaled_adam:ScaledAdamChoice",
        "arXiv 2402.02347",
        "each half's gradient divided by the other's Gram matrix, then Adam",
        2e-3,
    ),
    "loft": OptimizerMethod(
        ".optim.loft:LoftChoice",
        "arXiv 2505.21289",
        "full fine-tuning's AdamW as seen from one half, the halves in turn",
        1e-4,
        "weight",
    ),
}

__getattr__ = lazy_attributes(
    __name__,
    OPTIMIZERS,
    {
        "Loft": ".optim.loft:Loft",
        "LoraMuon": ".optim.lora_muon:LoraMuon",
        "LoraPro": ".optim.lora_pro:LoraPro",
        "OptimizerChoice": ".optim.choice:OptimizerChoice",
        "PairOptimizer": ".optim.pair_optimizer:PairOptimizer",
        "Polora": ".optim.polora:Polora",
        "RankAllocator": ".variants.rank_allocator:RankAllocator",
        "ScaledAdam": ".optim.scaled_adam:ScaledAdam",
        "Spectral": ".optim.spectral:Spectral",
        "derived_ratio": ".optim.lora_plus:derived_ratio",
        "param_groups": ".optim.lora_plus:param_groups",
    },
)
