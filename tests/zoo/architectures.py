"""Tiny models of transformers' architectures, made from their configurations with every size shrunk."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

LARGEST = 12_000_000  # numbers; what cannot be shrunk below is no tiny model

# Name of a field → the value it shrinks to. Names mean the same in most configurations.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size", "emb_dim", "width"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "text_embed_dim", "encoder_hidden_size", "d_embed"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "inner_dim"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "type_vocab_size_", "max_vocab_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("image_size", "img_size"), 32),
    "patch_size": 8,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    "first_k_dense_replace": 1,
    **dict.fromkeys(("state_size", "d_state", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("num_buckets",), 32),
    "conv_dim": (32, 32),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "num_mel_bins": 16,
    "num_codevectors_per_group": 8,
    "hidden_sizes": [16, 16, 32, 32],
    "embed_dims": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "use_cache": False,
    "use_mamba_kernels": False,
    "num_labels": 3,
}
# What one architecture needs beside, or instead.
MORE: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 16},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    "mamba": {"conv_kernel": 4},
    "falcon_mamba": {"conv_kernel": 4},
    "bit": {"num_groups": 4, "image_size": 64},
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "deepseek_v2": {"topk_method": "greedy"},
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 16},
    "nemotron": {"num_key_value_heads": 4},
    "pvt": {"num_attention_heads": [1, 2, 4, 4]},
    "pvt_v2": {"num_attention_heads": [1, 2, 4, 4]},
    "glpn": {"num_attention_heads": [1, 2, 4, 4]},
    "videomae": {"num_frames": 4},
    "timesformer": {"num_frames": 4},
    "yolos": {"image_size": [32, 32]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "csm": {"audio_num_codebooks": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "hidden_size": 32},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "local"]},
    "deberta-v2": {"position_buckets": 8},
    "gpt_oss": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
}

HEADS = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForImageClassification",
    "AutoModelForAudioClassification", "AutoModelForSequenceClassification", "AutoModel",
)  # fmt: skip


class NotTiny(Exception):
    """The architecture cannot be made small by shrinking its configuration."""


def shrink(config: PreTrainedConfig, more: dict[str, Any]) -> None:
    """Make every size of a configuration, and of those inside it, small."""
    for name in list(vars(config)):
        value = getattr(config, name)
        if isinstance(value, PreTrainedConfig):
            shrink(value, more)
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            setattr(config, name, (value * 2)[:1] + value[-1:])
        elif (chosen := more.get(name, SIZES.get(name))) is not None and _alike(value, chosen):
            setattr(config, name, chosen)


def _alike(value: Any, chosen: Any) -> bool:
    """Whether a field of this value can take the chosen one."""
    both = (value, chosen)
    return any(all(isinstance(item, kind) for item in both) for kind in (int | float, list | tuple))


def automatic(config: PreTrainedConfig) -> Any:
    """The automatic class that builds a model of this configuration, with a head where there is one; or None."""
    heads = HEADS[1:] if getattr(config, "is_encoder_decoder", False) else HEADS
    classes = (getattr(transformers, head) for head in heads)
    return next((auto for auto in classes if type(config) in auto._model_mapping), None)


def configuration(model_type: str) -> PreTrainedConfig:
    """The architecture's configuration with small sizes."""
    config = CONFIG_MAPPING[model_type]()
    shrink(config, MORE.get(model_type, {}))
    return config


def build(model_type: str) -> nn.Module:
    """A tiny model, in evaluation mode and frozen: torch has other kernels for weights that want a gradient.

    Raises:
        NotTiny: the sizes cannot be shrunk. Whatever else transformers raises.
    """
    config = configuration(model_type)
    auto = next(
        (getattr(transformers, head) for head in HEADS if type(config) in getattr(transformers, head)._model_mapping),
        None,
    )
    if auto is None:
        raise NotTiny("no automatic class takes it")
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if count > LARGEST:
        raise NotTiny(f"{count:,} numbers")
    torch.manual_seed(0)
    return auto.from_config(config).float().eval().requires_grad_(False)


def batch_for(model: Any) -> dict[str, Tensor]:
    """Inputs by the names that the model's forward asks for."""
    torch.manual_seed(1)
    config, asked = model.config, inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", config)
    vocabulary = getattr(text, "vocab_size", None) or 64
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", config), "image_size", 32)
    channels = getattr(config, "num_channels", None) or getattr(
        getattr(config, "vision_config", config), "num_channels", 3
    )
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: torch.randint(1, min(vocabulary, 64), (2, 8)),
        "pixel_values": lambda: torch.randn(
            2, channels, size if isinstance(size, int) else size[0], size if isinstance(size, int) else size[0]
        ),
        "input_values": lambda: torch.randn(2, 400),
        "input_features": lambda: torch.randn(
            2, getattr(config, "num_mel_bins", 16), 2 * getattr(config, "max_source_positions", 32)
        ),
        "inputs_embeds": lambda: torch.randn(2, 8, config.hidden_size),
    }
    main = model.main_input_name
    names = [main] if main in makers else [name for name in makers if name in asked][:1]
    if "pixel_values" in asked and "input_ids" in asked and main == "input_ids" and hasattr(config, "projection_dim"):
        names = ["input_ids", "pixel_values"]
    batch = {name: makers[name]() for name in names}
    if "decoder_input_ids" in asked:
        batch["decoder_input_ids"] = torch.randint(1, min(vocabulary, 64), (2, 5))
    return batch


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the model is for: its logits, or else the first tensor of numbers that it returns."""
    returned = model(**batch)
    named = [returned[key] for key in ("logits", "logits_per_text", "last_hidden_state") if key in returned]
    tensors = named or [value for value in returned.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return tensors[0]


def names() -> Iterator[str]:
    """All of transformers' architectures that an automatic class builds, by their ``model_type``."""
    for name in sorted(CONFIG_MAPPING.keys()):
        if automatic_by_name(name):
            yield name


def automatic_by_name(name: str) -> bool:
    """Whether an automatic class builds it; of a part of another, none does."""
    mappings = (getattr(transformers, head)._model_mapping for head in HEADS)
    return any(CONFIG_MAPPING[name] in mapping for mapping in mappings)
