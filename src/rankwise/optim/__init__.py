"""Optimizers that know of the pair: LoRA+ parameter groups, LoRA-Pro. One line a method in the table."""

from rankwise.optim import lora_plus, lora_pro
from rankwise.optim.lora_plus import derived_ratio, param_groups
from rankwise.optim.lora_pro import LoraPro
from rankwise.optim.table import OPTIMIZERS, AdamWChoice, LoraPlusChoice, LoraProChoice, OptimizerChoice
from rankwise.variants.rank_allocator import RankAllocator

__all__ = [
    "OPTIMIZERS",
    "AdamWChoice",
    "LoraPlusChoice",
    "LoraPro",
    "LoraProChoice",
    "OptimizerChoice",
    "RankAllocator",
    "derived_ratio",
    "lora_plus",
    "lora_pro",
    "param_groups",
]
