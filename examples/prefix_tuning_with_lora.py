"""Prefix tuning from PEFT on a model that carries a rankwise adapter: both train, each is saved by its own library.

    python examples/prefix_tuning_with_lora.py

A tiny random Llama on the CPU, a few seconds. rankwise leaves the model's classes and weights alone, so PEFT wraps it
like any other. PEFT freezes whatever it wraps; ``rw.activate`` says afterwards that the adapter is trained too.
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    tokens = torch.randint(64, (4, 12))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    model = rw.attach(tiny_llama(), rw.LoRA(rank=4, init="pissa"))
    both = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    rw.activate(both, "default")

    optimizer = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = both(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        both.save_pretrained(Path(folder) / "prefix")
        rw.save(both, Path(folder) / "lora")
        again = rw.load(tiny_llama(), Path(folder) / "lora")
        again = PeftModel.from_pretrained(again, str(Path(folder) / "prefix"))
        print(f"loaded again: loss {again.eval()(**batch).loss.item():.3f}")


if __name__ == "__main__":
    main()
