"""Optimizers that know of the pair: LoRA+ parameter groups, LoRA-Pro. One line a method in the table."""

from rankwise.optim import lora_plus, lora_pro
from rankwise.optim.choice import OptimizerChoice
from rankwise.optim.lora_plus import AdamWChoice, LoraPlusChoice, derived_ratio, param_groups
from rankwise.optim.lora_pro import LoraPro, LoraProChoice
from rankwise.optim.pair_optimizer import PairOptimizer
from rankwise.optim.rank_allocator import RankAllocator
from rankwise.optim.table import OPTIMIZERS

__all__ = [
    "OPTIMIZERS",
    "AdamWChoice",
    "LoraPlusChoice",
    "LoraPro",
    "LoraProChoice",
    "OptimizerChoice",
    "PairOptimizer",
    "RankAllocator",
    "derived_ratio",
    "lora_plus",
    "lora_pro",
    "param_groups",
]
