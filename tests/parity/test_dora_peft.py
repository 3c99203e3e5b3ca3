"""DoRA beside PEFT's: forward, gradients, ten optimiser steps, and its files, both ways. In fp32, to 1e-5.

PEFT's norm of a grouped convolution is of another matrix (B reshaped across groups), so groups are left out here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.adapted.adapted import Adapted


def conv1d() -> nn.Module:
    layer = Conv1D(10, 12)
    nn.init.normal_(layer.bias)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(3, 5, 12)),
    "linear_without_bias": (lambda: nn.Linear(12, 10, bias=False), lambda: torch.randn(7, 12)),
    "conv1d": (conv1d, lambda: torch.randn(3, 5, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "conv2d_without_bias": (lambda: nn.Conv2d(4, 6, (3, 1), bias=False), lambda: torch.randn(2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(11, 8), lambda: torch.randint(0, 11, (3, 5))),
}


@pytest.fixture(params=LAYERS)
def case(request: Any) -> tuple[Callable[[], nn.Module], Tensor]:
    """A maker of equal models, and an input."""
    make, data = LAYERS[request.param]
    state = make().state_dict()

    def model() -> nn.Module:
        layer = make()
        layer.load_state_dict(state)
        return nn.Sequential(layer)

    return model, data()


def peft_dora(model: nn.Module) -> Any:
    """PEFT's DoRA with a pair that is no longer at its start."""
    transposed = isinstance(model[0], Conv1D)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["0"],
        use_dora=True,
        init_lora_weights=True,
        fan_in_fan_out=transposed,
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return wrapped


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A, B and m → parameter, of either library's model."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found["m" if "magnitude" in name else "A" if "_A" in name else "B"] = parameter
    assert found.keys() == {"A", "B", "m"}
    return found


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)


def test_the_same_function_gradients_and_training(case: Any, tmp_path: Path) -> None:
    model, x = case
    theirs = peft_dora(model())
    theirs.save_pretrained(tmp_path)
    ours = rw.load(model(), tmp_path, trainable=True)
    target = torch.randn_like(theirs(x))
    close(ours(x), theirs(x))
    for one in (ours, theirs):
        (one(x) - target).square().mean().backward()
    for name, parameter in trained_tensors(ours).items():
        close(parameter.grad, trained_tensors(theirs)[name].grad)
    for one in (ours, theirs):
        one.zero_grad()
        train(one, x, target, 10)
    close(ours(x), theirs(x))
    for name, parameter in trained_tensors(ours).items():
        close(parameter, trained_tensors(theirs)[name])


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_peft_reads_what_is_written(case: Any, init: str, tmp_path: Path) -> None:
    model, x = case
    ours = rw.attach(model(), rw.LoRA(rank=2, alpha=3, variant="dora", init=init, target_modules=["0"]))
    train(ours, x, torch.randn_like(ours(x)), 5)
    rw.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(), str(tmp_path)).eval()
    close(theirs(x), ours(x))
    magnitudes = Adapted.of(ours).adapter_layers("default")["0"].extra_tensors()["lora_magnitude_vector"]
    (held,) = [p for n, p in theirs.named_parameters() if "magnitude" in n]
    assert magnitudes.shape == held.shape


def test_peft_merges_to_the_same_weight(case: Any, tmp_path: Path) -> None:
    model, _ = case
    theirs = peft_dora(model())
    theirs.save_pretrained(tmp_path)
    ours = rw.load(model(), tmp_path)
    rw.merge(ours, keep_base=False)
    close(ours[0].weight, theirs.merge_and_unload()[0].weight)
