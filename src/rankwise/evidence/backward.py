"""Forward and backward over batches, showing each layer's input and output gradient, without touching a parameter.

No weight needs ``requires_grad`` and none gets a ``.grad``, so frozen and quantised bases work.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import EvidenceError, NoGradient, NonFiniteGradient
from rankwise.evidence.passes import each_batch, hooked, layer_input, run_forward, undisturbed
from rankwise.layers import Kind

Loss = Callable[[nn.Module, Any], Tensor]
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
                found = float(value.detach())
                raise NonFiniteGradient(f"batch {count - 1}: the loss is {found}; expected a finite number")
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
