"""Small models, and adapter directories that PEFT wrote for them."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

# What PEFT and transformers say on the way, and what is meant here.
SAID = (
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(5))


def stack() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(64, 24), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 20), nn.Linear(20, 20))


def llama(**fields: Any) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y = model.eval()(IDS)
    return y if isinstance(y, Tensor) else y.logits


def written(base: nn.Module, where: Path, size: float = 0.05, **fields: Any) -> nn.Module:
    """A PEFT adapter with every trained tensor moved, saved; as PEFT reads it on a clean base."""
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(**copy.deepcopy(fields)))  # PEFT changes lists in place
    perturb_peft(peft, size)
    peft.save_pretrained(str(where))
    return PeftModel.from_pretrained(copy.deepcopy(base), str(where))


def perturb_peft(peft: nn.Module, size: float = 0.05) -> None:
    """Move every trained tensor."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def rewritten(where: Path, **fields: Any) -> Path:
    """The same directory with other entries in its configuration."""
    path = where / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return where
