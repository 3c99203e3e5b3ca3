"""Optimizers that know of the pair: LoRA+ parameter groups, LoRA-Pro. One file a method, one row in the table.

A row makes the optimizer's options as plain values; called with a model they build the optimizer.
"""

from rankwise.methods import Method, lazy_attributes

OPTIMIZERS: dict[str, Method] = {
    "adamw": Method(".optim.lora_plus:AdamWChoice", "arXiv 1711.05101", "torch's AdamW on the pairs: the default"),
    "lora-plus": Method(
        ".optim.lora_plus:LoraPlusChoice", "arXiv 2402.12354", "AdamW with a larger learning rate for B than for A"
    ),
    "lora-pro": Method(
        ".optim.lora_pro:LoraProChoice",
        "arXiv 2407.18242",
        "moves the pair so that the weight moves as full fine-tuning would move it",
    ),
}

__getattr__ = lazy_attributes(
    __name__,
    OPTIMIZERS,
    {
        "LoraPro": ".optim.lora_pro:LoraPro",
        "OptimizerChoice": ".optim.choice:OptimizerChoice",
        "PairOptimizer": ".optim.pair_optimizer:PairOptimizer",
        "RankAllocator": ".variants.rank_allocator:RankAllocator",
        "derived_ratio": ".optim.lora_plus:derived_ratio",
        "param_groups": ".optim.lora_plus:param_groups",
    },
)
