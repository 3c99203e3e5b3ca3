"""Exact weight gradients, collected over batches without touching a parameter.

A hook on each layer sees its input X and the gradient dY of its output; G = dYᵀX is summed in fp32. No weight needs
``requires_grad`` and none gets a ``.grad``, so frozen and quantised bases work.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.errors import EvidenceError, NoGradient, NonFiniteGradient
from rankwise.evidence.passes import each_batch, hooked, layer_input, run_forward, undisturbed
from rankwise.layers import Kind
from rankwise.lowrank import truncated_svd
from rankwise.plan import target_layers
from rankwise.shapes import Float

Loss = Callable[[nn.Module, Any], Tensor]


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


def gradients(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Iterable[str] = "all-linear",
    method: Literal["exact"] = "exact",
    *,
    loss: Loss | None = None,
) -> dict[str, ExactGradient]:
    """The weight gradients of the chosen layers, averaged over the batches.

    Args:
        batches: dicts for ``model(**batch)`` whose output has ``.loss``, or anything that ``loss(model, batch)`` takes.
        target_modules: as in ``LoRA``.
        method: "exact" keeps every G in fp32.

    Returns:
        Module path → evidence; ``.svd(k)`` gives U [out, k], S [k], V [in, k].

    Raises:
        EvidenceError: no batches, or a batch that the model cannot take.
        NoGradient: a layer got no gradient. NonFiniteGradient: NaN or infinity in the loss or a gradient.
        The model is left exactly as it was.
    """
    if method != "exact":
        raise EvidenceError(f"method must be 'exact', found {method!r}")
    return exact_gradients(model, target_layers(model, target_modules), batches, loss)


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


Observer = Callable[[str, Kind, nn.Module, Tensor, Tensor], None]


def run_backward(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], loss: Loss | None, observe: Observer
) -> int:
    """Forward and backward over the batches, calling ``observe(name, kind, layer, X, dY)``; returns their number.

    Raises:
        EvidenceError: no batches, a batch without a loss. NonFiniteGradient: a loss that is not finite.
    """
    loss_of = loss or _loss_of_output
    count = 0
    with undisturbed(model), hooked(layers, lambda name, kind: _capture(name, kind, observe)), torch.enable_grad():
        for count, batch in enumerate(each_batch(batches), 1):
            value = loss_of(model, batch)
            if not bool(torch.isfinite(value)):
                raise NonFiniteGradient(f"batch {count - 1}: the loss is {float(value)}; expected a finite number")
            if not value.requires_grad:
                raise NoGradient(f"batch {count - 1}: the loss depends on none of the {len(layers)} adapted layers")
            value.backward()  # type: ignore[no-untyped-call]
    return count


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    value = getattr(run_forward(model, batch), "loss", None)
    if not isinstance(value, Tensor):
        raise EvidenceError(
            f"model(**batch) with keys {sorted(batch)} returned no loss; add 'labels' to the batch, "
            f"or pass loss=function(model, batch)"
        )
    return value


def _capture(name: str, kind: Kind, observe: Observer) -> Any:
    """A forward hook that waits for the gradient of the layer's output."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = layer_input(args, kwargs).detach()
        version = x._version
        if not output.requires_grad:
            output.requires_grad_()  # with everything frozen the graph starts here

        def on_gradient(grad_y: Tensor) -> None:
            if x._version != version:
                raise EvidenceError(f"{name}: its input was changed in place after the layer ran; its gradient is lost")
            observe(name, kind, layer, x, grad_y)

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        return output

    return hook
