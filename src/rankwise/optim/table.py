"""The table of optimizers: each a set of options that builds a torch optimizer for a model with an adapter."""

from rankwise.methods import Entry
from rankwise.optim.lora_plus import AdamWChoice, LoraPlusChoice
from rankwise.optim.lora_pro import LoraProChoice

OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(AdamWChoice, "arXiv 1711.05101", "torch's AdamW on the pairs: the default"),
    "lora-plus": Entry(LoraPlusChoice, "arXiv 2402.12354", "AdamW with a larger learning rate for B than for A"),
    "lora-pro": Entry(
        LoraProChoice, "arXiv 2407.18242", "moves the pair so that the weight moves as full fine-tuning would move it"
    ),
}
