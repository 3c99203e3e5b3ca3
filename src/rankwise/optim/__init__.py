"""Optimizers that know of the pair: LoRA+ parameter groups, LoRA-Pro."""

from rankwise.optim.lora_plus import derived_ratio, param_groups

__all__ = ["derived_ratio", "param_groups"]
