"""Exact weight gradients: G = dYᵀX of each layer, summed over batches in fp32."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import NoGradient, NonFiniteGradient
from rankwise.evidence.backward import Loss, run_backward
from rankwise.layers import Kind
from rankwise.lowrank import truncated_svd
from rankwise.shapes import Float


@dataclass(frozen=True, eq=False)
class ExactGradient:
    """The mean gradient of one weight over the batches.

    Attributes:
        matrix: G = dL/dW, [out, in].
    """

    matrix: Float[Tensor, "out in"]

    @property
    def energy(self) -> float:
        """‖G‖²_F."""
        return float(self.matrix.double().square().sum())

    def svd(self, k: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
        """The k leading singular triplets: U [out, k], S [k] descending, V [in, k]."""
        return truncated_svd(self.matrix, k, torch.Generator().manual_seed(0))


def exact_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], loss: Loss | None = None
) -> dict[str, ExactGradient]:
    """:func:`gradients` for layers that are already chosen."""
    sums: dict[str, Tensor] = {}

    def observe(name: str, kind: Kind, layer: nn.Module, x: Tensor, grad_y: Tensor) -> None:
        grad = kind.gradient(layer, x, grad_y)
        sums[name] = sums[name].add_(grad) if name in sums else grad

    count = run_backward(model, layers, batches, loss, observe)
    for name in layers:
        _check_gradient(name, sums.get(name))
    return {name: ExactGradient(sums[name] / count) for name in layers}


def _check_gradient(name: str, grad: Tensor | None) -> None:
    if grad is None or not bool(grad.any()):
        raise NoGradient(
            f"{name}: no gradient reached this layer (its output does not influence the loss, or its weight is used "
            f"past its forward); expected a non-zero gradient from every adapted layer: name it in exclude_modules, "
            f"or check the labels of the batches"
        )
    if not bool(torch.isfinite(grad).all()):
        raise NonFiniteGradient(
            f"{name}: its gradient holds NaN or infinity; look at the batches, or load the model in fp32 or bf16"
        )
