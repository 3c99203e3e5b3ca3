"""A tiny base and adapters of it that say different things, saved; and a service for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_llama import save_tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import rankwise as rw
from rankwise.serve.options import ServerOptions
from rankwise.serve.server import make_service

OPTIONS = ServerOptions(max_batch=8, max_waiting=16, max_adapters=3, max_length=120, max_tokens=100, max_body=20_000)


def save_adapter(model: PreTrainedModel, path: Path, seed: int, size: float = 0.3, **spec: Any) -> None:
    """An adapter of a model with random weights, large enough to change what it says."""
    generator = torch.Generator().manual_seed(seed)
    fields = {"rank": 2 + seed % 3, "target_modules": ["q_proj", "v_proj", "down_proj"], **spec}
    rw.attach(model, rw.LoRA(**fields))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    rw.save(model, path)
    rw.detach(model)


def save_base_and_adapters(folder: Path, count: int) -> None:
    """``base`` and ``adapters/a0``, ``a1``, ... of unequal ranks."""
    save_tiny_llama(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    for seed in range(count):
        save_adapter(model, folder / f"adapters/a{seed}", seed)


def base_model(folder: Path) -> PreTrainedModel:
    """The tiny base, fresh."""
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def service_of(folder: Path, **options: Any) -> Any:
    """A service for the tiny base, named "base", that may load what lies in ``adapters``; nothing is loaded yet."""
    settings = ServerOptions(**{**vars(OPTIONS), **options})
    return make_service(base_model(folder), tiny_tokenizer(), "base", settings, [folder / "adapters"])


def alone(model: PreTrainedModel, adapter: Path | None, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What transformers' own ``generate`` answers greedily, with one adapter loaded."""
    if adapter is not None:
        rw.load(model, adapter)
    try:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        return output[0, len(prompt) :].tolist()
    finally:
        if adapter is not None:
            rw.detach(model)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Wait for something that another thread does."""
    import time

    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()
