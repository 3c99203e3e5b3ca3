"""What every collection of evidence shares: batches through a model that is left exactly as it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import EvidenceError
from rankwise.placement import check_in_memory

Hook = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]


def each_batch(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, of which there must be at least one.

    Raises:
        EvidenceError: none, or one batch where an iterable of batches belongs.
    """
    if isinstance(batches, Mapping | Tensor | str):
        raise EvidenceError(
            f"batches must be an iterable of batches, found one {type(batches).__name__}; wrap it in a list"
        )
    if not isinstance(batches, Iterable):
        raise EvidenceError(f"batches must be an iterable of batches, found {batches!r}; give a list or a DataLoader")
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise EvidenceError("batches is empty; give at least one batch of the training data")


def repeatable(batches: Iterable[Any], times: int) -> Iterable[Any]:
    """The batches, for so many passes over them: those that may be gone after one are kept in a list."""
    return batches if times == 1 or isinstance(batches, Sequence) else list(each_batch(batches))


def run_forward(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)``, the batch's tensors on the model's device.

    Raises:
        EvidenceError: the batch is no dict.
    """
    if not isinstance(batch, Mapping):
        raise EvidenceError(
            f"a batch is a {type(batch).__name__}; expected a dict for model(**batch), "
            f"or pass loss=function(model, batch)"
        )
    device = next(model.parameters()).device
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) with all parameters frozen, so no ``.grad`` is written; everything is put back.

    transformers' modules checkpoint activations in training mode only: those that are told to are left in it.

    Raises:
        AttachError: the model is offloaded.
    """
    check_in_memory(model)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, training in modes:
            module.training = training and bool(getattr(module, "gradient_checkpointing", False))
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.inference_mode(False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """A forward hook (name, layer, args, kwargs, output) on each layer, taken off again whatever happens."""
    with ExitStack() as handles:
        for name, layer in layers.items():
            handles.enter_context(layer.register_forward_hook(partial(hook, name), with_kwargs=True))
        yield


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that a layer's forward was called with, by position or by name."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))  # "input", or "x" for a Conv1D
    return x
