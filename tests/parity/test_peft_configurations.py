"""What PEFT's entries mean: read as PEFT reads them, or refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from zoo import left_as_it_was

import rankwise as rw
from rankwise.errors import UnsupportedAdapter
from rankwise.format.peft import read_adapter
from rankwise.inspection.inspection import inspect

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(5))


def _stack() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(64, 24), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 20), nn.Linear(20, 20))


def _llama(**fields: Any) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _gpt2() -> nn.Module:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y = model.eval()(IDS)
    return y if isinstance(y, Tensor) else y.logits


def written(base: nn.Module, where: Path, size: float = 0.05, **fields: Any) -> nn.Module:
    """A PEFT adapter with every trained tensor moved, saved; as PEFT reads it on a clean base."""
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(str(where))
    return PeftModel.from_pretrained(copy.deepcopy(base), str(where))


def rewritten(where: Path, **fields: Any) -> Path:
    """The same directory with other entries in its configuration."""
    path = where / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return where


# --------------------------------------------------------------------------- pairs that are relative to a changed base

RELATIVE: dict[str, tuple[Any, dict[str, Any]]] = {
    "pissa": (_stack, {"init_lora_weights": "pissa"}),
    "olora": (_stack, {"init_lora_weights": "olora"}),
    "with-an-embedding": (_stack, {"init_lora_weights": "pissa", "target_modules": ["0", "1", "3"]}),
    "rslora-patterns": (
        _stack,
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"3": 5}, "alpha_pattern": {"1": 7}},
    ),
    "dora": (_stack, {"init_lora_weights": "pissa", "use_dora": True}),
    "olora-dora": (_stack, {"init_lora_weights": "olora", "use_dora": True}),
    "llama": (_llama, {"init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "gpt2": (_gpt2, {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    # PEFT decomposes the transpose here, so that its start is no start; what it computes from the file is this still.
    "gpt2-olora": (_gpt2, {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIVE)
def test_a_pair_that_is_relative_to_a_changed_base(name: str, tmp_path: Path):
    build, fields = RELATIVE[name]
    base = build()
    theirs = written(base, tmp_path, **{"r": 4, "lora_alpha": 6, "target_modules": ["1", "3", "4"], **fields})
    expected, before = outputs(theirs), outputs(base)
    assert (expected - before).abs().max() > 1e-3
    ours = rw.load(copy.deepcopy(base), tmp_path)
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    assert not inspect(tmp_path).problems
    rw.save(ours, tmp_path / "again")  # which is a change of the pretrained weights, in the standard form
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again"))
    assert (outputs(again) - expected).abs().max() <= 1e-5
    rw.merge(ours)
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    torch.testing.assert_close(outputs(rw.detach(ours)), before, rtol=0, atol=0)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_untrained_relative_pair_changes_nothing(start: str, tmp_path: Path):
    """Up to the rounding of the stored pair, which PEFT writes in the base's type."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        base = _stack().to(dtype)
        written(base, tmp_path, size=0.0, r=4, target_modules=["1", "3", "4"], init_lora_weights=start)
        before = outputs(base)
        assert (outputs(rw.load(base, tmp_path)) - before).abs().max() <= tolerance * before.abs().max()


def test_what_needs_the_base_to_be_a_change(tmp_path: Path):
    written(_stack(), tmp_path, r=4, target_modules=["1", "3", "4"], init_lora_weights="pissa")
    with pytest.raises(UnsupportedAdapter, match=r"relative to a base that init_lora_weights 'pissa' had changed"):
        read_adapter(tmp_path)
    report = inspect(tmp_path)
    assert report.relative_to == "pissa" and all(site.change is None for site in report.sites)
    answers = {verdict.engine: verdict.answer for verdict in report.engines}
    assert answers.pop("rankwise") == answers.pop("PEFT") == "yes" and set(answers.values()) == {"after export"}


# ------------------------------------------------------------------------------------------------------ refused by name

REFUSED: dict[str, dict[str, Any]] = {
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "a start of tomorrow": {"init_lora_weights": "cauchy"},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [3, 4]},
    "parameters": {"target_parameters": ["experts.down_proj"]},
    "replication": {"layer_replication": [[0, 1], [0, 2]]},
    "alora": {"alora_invocation_tokens": [1]},
    "qalora": {"use_qalora": True},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "arrow": {"arrow_config": {"top_k": 3}},
    "kasa": {"kasa_config": {"beta": 1e-4}},
    "monteclora": {"monteclora_config": {"samples": 2}},
    "megatron": {"megatron_config": {"hidden_size": 3}},
    "tied": {"ensure_weight_tying": True},
    "an entry of tomorrow": {"use_spectral_mixing": 3},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_entry_that_changes_the_function_is_refused_by_name(name: str, tmp_path: Path):
    written(_stack(), tmp_path, r=2, target_modules=["1"])
    rewritten(tmp_path, **REFUSED[name])
    model = _stack()
    (entry, *_) = REFUSED[name]
    with left_as_it_was(model), pytest.raises(UnsupportedAdapter, match=entry):
        rw.load(model, tmp_path)
    (problem,) = inspect(tmp_path).problems
    assert problem.startswith("UnsupportedAdapter") and entry in problem


NEUTRAL: dict[str, dict[str, Any]] = {
    "nulls": {"bias": None, "lora_bias": None, "init_lora_weights": None, "use_dora": None, "modules_to_save": None},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "an entry of tomorrow that is off": {"use_spectral_mixing": None, "spectral_config": {}},
    "of training": {"velora_config": {"scale": 1.0}, "inference_mode": False, "revision": "main"},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_entry_that_changes_nothing_is_taken(name: str, tmp_path: Path):
    base = _stack()
    expected = outputs(written(base, tmp_path, r=2, target_modules=["1", "3"]))
    rewritten(tmp_path, **NEUTRAL[name])
    assert not inspect(tmp_path).problems
    assert (outputs(rw.load(base, tmp_path)) - expected).abs().max() <= 1e-5
