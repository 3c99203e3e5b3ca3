"""Tiny causal language models of many architectures, made in code."""

from typing import Any

import torch
import transformers.pytorch_utils
from torch import nn

import rankwise as rw

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ONE_KV = {"num_key_value_heads": 4}
_HEADS = {"head_dim": 8, "tie_word_embeddings": True}

# Name of the configuration → what it takes beside the above.
_FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Gemma": {**_HEADS, "hidden_act": "gelu"},
    "Gemma2": {**_HEADS, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16, "num_hidden_layers": 6},
    "GPT2": {},
    "Granite": {},
    "Olmo2": {},
    "Phi": {**_ONE_KV, "partial_rotary_factor": 0.5},
    "Phi3": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "SmolLM3": {},
    "Starcoder2": {},
}
_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
FAMILIES = tuple(_FAMILIES)


def tiny_model(family: str, **fields: Any) -> Any:
    """A model with random weights, the same each time."""
    common = _GPT2 if family == "GPT2" else _SMALL
    config = getattr(transformers, f"{family}Config")(**{**common, **_FAMILIES[family], **fields})
    torch.manual_seed(0)
    cls = getattr(transformers, _CLASSES.get(family, f"{family}ForCausalLM"))
    return cls(config).eval()


def patterns(model: nn.Module) -> dict[str, Any]:
    """rsLoRA with a rank and an alpha of their own for two of the model's kinds of layers."""
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    names = {path.rpartition(".")[2] for path, layer in model.named_modules() if isinstance(layer, linear)}
    first, *_, last = sorted(names - {"lm_head"})
    return {"scaling": "rslora", "rank_pattern": {first: 2}, "alpha_pattern": {last: 9}}


def adapted(model: nn.Module, size: float = 0.3, **fields: Any) -> nn.Module:
    """The model with an adapter on it, moved as by training."""
    rw.attach(model, rw.LoRA(**{"rank": 3, "alpha": 6, **fields}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model
