"""Exact weight gradients: G = dYᵀX of each layer, summed over batches in fp32."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.algebra.svd import truncated_svd
from rankwise.errors import NonFiniteGradient
from rankwise.evidence.backward import Loss, note_idle, run_backward
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
    idle: list[str] | None = None,
) -> dict[str, ExactGradient]:
    """:func:`rankwise.gradients` for layers that are already chosen, all in one pass.

    Args:
        idle: takes the names of layers that no gradient reached, which then have no evidence; None: they are an error.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, layer: nn.Module, x: Tensor, grad_y: Tensor) -> None:
        G = kind_of(layer).gradient(layer, x, grad_y).to(device)
        sums[name] = sums[name].add_(G) if name in sums else G

    count = run_backward(model, layers, batches, loss, add)
    evidence: dict[str, ExactGradient] = {}
    for name, layer in layers.items():
        unseen = name not in sums  # by this process
        G = summed(torch.zeros(kind_of(layer).shape(layer), device=device) if unseen else sums.pop(name))
        if not bool(G.any()):
            note_idle(name, idle)
            continue
        if not bool(torch.isfinite(G).all()):
            raise NonFiniteGradient(
                f"{name}: its gradient holds NaN or infinity; look at the batches, or load the model in fp32 or bf16"
            )
        evidence[name] = ExactGradient(G.div_(count))
    return evidence
