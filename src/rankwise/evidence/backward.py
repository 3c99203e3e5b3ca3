"""Forward and backward over batches, showing each layer's input and output gradient, without touching a parameter.

No weight needs ``requires_grad`` and none gets a ``.grad``, so frozen and quantised bases work.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import EvidenceError, NoGradient, NonFiniteGradient
from rankwise.evidence.processes import failing_together, total
from rankwise.evidence.undisturbed import each_batch, hooked, layer_input, run_forward, undisturbed
from rankwise.in_place import writable
from rankwise.layers.quantised import forbid_repacking

Loss = Callable[[nn.Module, Any], Tensor]

Observer = Callable[[str, nn.Module, Tensor, Tensor], None]


def run_backward(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], loss: Loss | None, observe: Observer
) -> int:
    """Forward and backward of all processes over their batches; returns the number of batches of all.

    Args:
        observe: called with each layer's name, the layer, its input X and the gradient of its output dY.

    Raises:
        EvidenceError: no batches, a batch without a loss. NonFiniteGradient: a loss that is not finite.
    """
    forbid_repacking(model)
    loss_of = loss or _loss_of_output
    count = 0
    with failing_together(), undisturbed(model), hooked(layers, partial(_capture, observe)), torch.enable_grad():
        for count, batch in enumerate(each_batch(batches), 1):
            value = _single(loss_of(model, batch), count - 1)
            if not bool(torch.isfinite(value)):
                raise NonFiniteGradient(
                    f"batch {count - 1}: the loss is {float(value.detach())}; expected a finite number"
                )
            if not value.requires_grad:
                raise NoGradient(f"batch {count - 1}: the loss depends on none of the {len(layers)} adapted layers")
            value.backward()  # type: ignore[no-untyped-call]
    return total(count)


def note_idle(name: str, idle: list[str] | None) -> None:
    """Note a layer that got no gradient, in any process.

    Raises:
        NoGradient: there is no list to note it in.
    """
    if idle is not None:
        idle.append(name)
        return
    raise NoGradient(
        f"{name}: no gradient reached this layer (its output does not influence the loss, or its weight is used past "
        f"its forward); expected a non-zero gradient from every adapted layer: name it in exclude_modules, or check "
        f"the labels of the batches"
    )


def _single(value: Any, number: int) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value
    what = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise EvidenceError(f"batch {number}: the loss is a {what}; expected a tensor of one number")


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    value = getattr(run_forward(model, batch), "loss", None)
    if not isinstance(value, Tensor):
        raise EvidenceError(
            f"model(**batch) with keys {sorted(batch)} returned no loss; add 'labels' to the batch, "
            f"or pass loss=function(model, batch)"
        )
    return value


def _capture(
    observe: Observer, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """A forward hook that waits for the gradient of the layer's output."""
    show = partial(observe, name, layer)
    start = torch.empty(0, requires_grad=True)  # with everything frozen the graph starts here
    return _Watched.apply(writable(layer, output), layer_input(args, kwargs), start, name, show)  # type: ignore[no-any-return, no-untyped-call]


class _Watched(torch.autograd.Function):
    """The identity on a layer's output, whose backward shows the layer's input and the gradient of its output.

    The input is kept as autograd keeps tensors, so activation checkpointing frees it and brings it back.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, start: Tensor, name: str, show: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.mark_dirty(output)  # it is not; but a view of it could not be written into by what follows
        ctx.save_for_backward(x)
        ctx.name, ctx.show = name, show
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        if torch.is_grad_enabled():  # create_graph: weights then take part in the backward pass too
            raise EvidenceError(
                f"{ctx.name}: the loss differentiates through the model, so its gradient is more than this layer's "
                f"inputs and output gradients say; collect with the loss without that term (a gradient penalty)"
            )
        try:
            (x,) = ctx.saved_tensors
        except RuntimeError as error:  # autograd's own check
            if "inplace operation" not in str(error):
                raise
            raise EvidenceError(
                f"{ctx.name}: its input was changed in place after the layer ran; its gradient is lost"
            ) from None
        ctx.show(x.detach(), grad_y)
        return grad_y, None, None, None, None
