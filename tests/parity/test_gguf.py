"""What is exported as GGUF: every site's change under its name, and what llama.cpp's own converter writes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from engine_readers import LLAMA_CPP
from tiny_models import FAMILIES, adapted, patterns, tiny_model
from zoo import relative

import rankwise as rw
from rankwise.exporting.gguf_adapter import interleaved

ROTATED = ("Llama", "Mistral", "Granite", "SmolLM3")
# Last part of a site's name → GGUF's.
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "dense": "attn_output",
    "qkv_proj": "attn_qkv", "c_attn": "attn_qkv",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "gate_up_proj": "ffn_up",
    "fc1": "ffn_up", "fc2": "ffn_down", "c_fc": "ffn_up",
}  # fmt: skip


def tensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}


def gguf_name(path: str) -> str:
    block = next(part for part in path.split(".") if part.isdigit())
    last = path.rpartition(".")[2]
    if last == "c_proj":
        return f"blk.{block}.{'ffn_down' if '.mlp.' in path else 'attn_output'}"
    return f"blk.{block}.{NAMES[last]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    rw.save(adapted(model, init="pissa", **patterns(model)), tmp_path / "adapter")
    rw.detach(model)
    exported = rw.export(tmp_path / "adapter", "llama.cpp", tmp_path / "out", base=model)
    assert exported.form == "adapter"
    fields, written = tensors(tmp_path / "out" / "adapter.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    sites = rw.read(tmp_path / "adapter").sites
    assert len(written) == 2 * len(sites)
    config = model.config
    for path, site in sites.items():
        name = gguf_name(path)
        A, B = written[f"{name}.weight.lora_a"], written[f"{name}.weight.lora_b"]
        change = (B @ A) * (fields["adapter.lora.alpha"] / B.shape[1])
        expected = site.delta.dense()
        last = path.rpartition(".")[2]
        if family in ROTATED and last in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
            expected = interleaved(expected, heads)
        assert relative(change, expected) < 1e-6, path


def test_embeddings_and_heads(tmp_path: Path) -> None:
    model = tiny_model("Llama")
    rw.save(adapted(model, target_modules=["embed_tokens", "lm_head"]), tmp_path / "adapter")
    rw.detach(model)
    rw.export(tmp_path / "adapter", "ollama", tmp_path / "out", base=model)
    fields, written = tensors(tmp_path / "out" / "adapter.gguf")
    scale = fields["adapter.lora.alpha"] / 3
    sites = rw.read(tmp_path / "adapter").sites
    A, B = written["token_embd.weight.lora_a"], written["token_embd.weight.lora_b"]
    assert relative((A @ B.T) * scale, sites["model.embed_tokens"].delta.dense().T) < 1e-6  # rows of tokens
    A, B = written["output.weight.lora_a"], written["output.weight.lora_b"]
    assert relative((B @ A) * scale, sites["lm_head"].delta.dense()) < 1e-6
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM BASE\nADAPTER ./adapter.gguf\n"


@pytest.mark.parametrize("site", ["embed_tokens", "lm_head"])
def test_a_tied_head_is_no_adapters(site: str, tmp_path: Path) -> None:
    model = tiny_model("Llama", tie_word_embeddings=True)
    rw.save(adapted(model, target_modules=[site]), tmp_path / "adapter")
    rw.detach(model)
    (verdict,) = rw.doctor(tmp_path / "adapter", "llama.cpp", base=model)
    assert verdict.answer == "no"
    with pytest.raises(rw.errors.MergeError, match=r"its weight is shared"):
        rw.export(tmp_path / "adapter", "llama.cpp", tmp_path / "out", base=model)


def test_a_layer_that_gguf_has_no_name_for(tmp_path: Path) -> None:
    """It is merged, and named by doctor."""
    model = tiny_model("Llama")
    model.model.layers[0].extra = torch.nn.Linear(4, 4)
    rw.save(adapted(model, target_modules=["extra"]), tmp_path / "adapter")
    rw.detach(model)
    (verdict,) = rw.doctor(tmp_path / "adapter", "llama.cpp", base=model)
    assert verdict.answer == "no"
    assert verdict.findings[0].sites == ("model.layers.0.extra",)
    assert rw.export(tmp_path / "adapter", "llama.cpp", tmp_path / "out", base=model).form == "merged checkpoint"


@pytest.mark.skipif(not LLAMA_CPP.is_dir(), reason=f"no {LLAMA_CPP}: run `make engines`")
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_what_llama_cpps_converter_writes(family: str, tmp_path: Path) -> None:
    """Of an adapter that it reads right, the same tensors: of the portable profile, whose alpha is its rank."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    rw.save(adapted(model), tmp_path / "adapter")
    rw.detach(model)
    rw.export(tmp_path / "adapter", "peft", tmp_path / "portable")
    rw.export(tmp_path / "portable", "llama.cpp", tmp_path / "out", base=model)
    command = [
        sys.executable,
        LLAMA_CPP / "convert_lora_to_gguf.py",
        tmp_path / "portable",
        "--base",
        tmp_path / "base",
    ]
    done = subprocess.run([*command, "--outfile", tmp_path / "theirs.gguf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = tensors(tmp_path / "out" / "adapter.gguf"), tensors(tmp_path / "theirs.gguf")
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours[0][key] == theirs[0][key]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in ours[1])
