"""A tiny model with every kind of layer that carries an adapter, each on its own input: one attach covers them all."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.variants import VARIANTS
from rankwise.variants.base import PairVariant

RANK = 2
PAIR_VARIANTS = [name for name, method in VARIANTS.items() if issubclass(method.cls, PairVariant)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
# Relative error of an output in this type. bf16 rounds to 2⁻⁹ = 2e-3: the layer's output, x Aᵀ, its product, the sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-13}


class ScaledEmbedding(nn.Embedding):
    """Gemma's: what is looked up is multiplied."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def _conv1d() -> nn.Module:
    layer = Conv1D(10, 12)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias)
    return layer


def _features() -> Tensor:
    return torch.randn(3, 5, 12)


def _image() -> Tensor:
    return torch.randn(3, 4, 6, 7)


def _ids() -> Tensor:
    return torch.randint(0, 11, (3, 9))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 10), _features),
    "linear_without_bias": (lambda: nn.Linear(12, 10, bias=False), _features),
    "wide": (lambda: nn.Linear(12, 40), _features),
    "conv1d": (_conv1d, _features),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3), _image),
    "conv2d_without_bias": (lambda: nn.Conv2d(4, 8, (3, 2), bias=False), _image),
    "conv2d_strided": (lambda: nn.Conv2d(4, 8, 3, stride=(2, 1), padding=(1, 2)), _image),
    "conv2d_same": (lambda: nn.Conv2d(4, 8, 3, padding="same"), _image),
    "conv2d_dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2), _image),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1), _image),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), _image),
    "conv2d_circular": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="circular", groups=4), _image),
    "embedding": (lambda: nn.Embedding(11, 8), _ids),
    "embedding_scaled": (lambda: ScaledEmbedding(11, 8), _ids),
}
# A grouped convolution of 4 groups has 1·3·3 = 9 columns and 8 rows: enough for 2r = 4 directions.


@dataclass
class Outputs:
    """What a Zoo returns: each layer's output by name, and a loss that depends on them all."""

    outputs: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        return sum((y.double().square().mean() for y in self.outputs.values()), torch.zeros((), dtype=torch.float64))


class Zoo(nn.Module):
    """One layer of every kind, or of the named kinds."""

    def __init__(self, dtype: torch.dtype = torch.float32, names: list[str] | None = None) -> None:
        super().__init__()
        for name in names or LAYERS:
            self.add_module(name, LAYERS[name][0]())
        self.to(dtype)

    def forward(self, **inputs: Tensor) -> Outputs:
        return Outputs({name: self.get_submodule(name)(x) for name, x in inputs.items()})


def zoo_and_inputs(dtype: torch.dtype = torch.float32, names: list[str] | None = None) -> tuple[Zoo, dict[str, Tensor]]:
    """A zoo, the same each time, and a batch for it."""
    torch.manual_seed(0)
    zoo = Zoo(dtype, names)
    inputs = {name: LAYERS[name][1]() for name in names or LAYERS}
    return zoo, {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}


def perturb(model: nn.Module, size: float = 0.1, seed: int = 7) -> None:
    """Move every trained tensor, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
            parameter.add_(noise.to(parameter.dtype))


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in fp64; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    gap = (found.detach().double() - expected.detach().double()).norm()
    return float(gap / expected.detach().double().norm().clamp_min(1e-300))


def fingerprint(model: nn.Module) -> str:
    """Everything that must be back after detach or an error: names, bytes, flags, modes, hooks, classes, attributes."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for path, parameter in model.named_parameters(remove_duplicate=False):
        digest.update(f"{path} {parameter.requires_grad} {parameter.grad is None}".encode())
    for path, module in model.named_modules():
        hooks = [list(module.__dict__[k].values()) for k in sorted(module.__dict__) if k.endswith("_hooks")]
        digest.update(f"{path} {type(module)} {module.training} {hooks} {sorted(module.__dict__)}".encode())
        digest.update(f"{len(module._forward_hooks_with_kwargs)} {sorted(module._modules)}".encode())
    return digest.hexdigest()


def base_bytes(model: nn.Module) -> str:
    """The base's own tensors, adapters left out."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        if ".rankwise." not in key:
            digest.update(key.encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside (an error that the test expects included), the model must be the same afterwards."""
    before = fingerprint(model)
    yield
    assert fingerprint(model) == before


def clone(model: nn.Module) -> Any:
    """A deep copy."""
    return deepcopy(model)
