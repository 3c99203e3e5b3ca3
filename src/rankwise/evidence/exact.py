"""Exact weight gradients: G = dYᵀX of each layer, summed over batches in fp32."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.algebra.svd import truncated_svd
from rankwise.errors import NoGradient, NonFiniteGradient
from rankwise.evidence.backward import Loss, run_backward
from rankwise.evidence.processes import summed
from rankwise.layers.kinds import kind_of
from rankwise.shapes import Float


@dataclass(frozen=True, eq=False)
class ExactGradient:
    """The mean gradient of one weight over the batches.

    Attributes:
        matrix: G = dL/dW, [out, in].
    """

    matrix: Float[Tensor, "out in"]

    def cpu(self) -> "ExactGradient":
        """The same on the CPU."""
        return ExactGradient(self.matrix.cpu())

    @property
    def energy(self) -> float:
        """‖G‖²_F."""
        return float(self.matrix.double().square().sum())

    def svd(self, k: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
        """The k leading singular triplets: U [out, k], S [k] descending, V [in, k]."""
        return truncated_svd(self.matrix, k, torch.Generator().manual_seed(0))


def exact_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    device: torch.device | str | None = None,
) -> dict[str, ExactGradient]:
    """:func:`rankwise.gradients` for layers that are already chosen, all in one pass."""
    sums = _Sums(device)
    count = run_backward(model, layers, batches, loss, sums.add)
    return {name: sums.result(name, layer, count) for name, layer in layers.items()}


class _Sums:
    """Σ dYᵀX of each layer while batches come in."""

    def __init__(self, device: torch.device | str | None) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, layer: nn.Module, x: Tensor, grad_y: Tensor) -> None:
        G = kind_of(layer).gradient(layer, x, grad_y).to(self.device)
        self.sums[name] = self.sums[name].add_(G) if name in self.sums else G

    def result(self, name: str, layer: nn.Module, count: int) -> ExactGradient:
        """The mean over all processes' ``count`` batches."""
        unseen = name not in self.sums  # by this process
        G = summed(torch.zeros(kind_of(layer).shape(layer), device=self.device) if unseen else self.sums.pop(name))
        _check_gradient(name, G)
        return ExactGradient(G.div_(count))


def _check_gradient(name: str, grad: Tensor) -> None:
    if not bool(grad.any()):
        raise NoGradient(
            f"{name}: no gradient reached this layer (its output does not influence the loss, or its weight is used "
            f"past its forward); expected a non-zero gradient from every adapted layer: name it in exclude_modules, "
            f"or check the labels of the batches"
        )
    if not bool(torch.isfinite(grad).all()):
        raise NonFiniteGradient(
            f"{name}: its gradient holds NaN or infinity; look at the batches, or load the model in fp32 or bf16"
        )
