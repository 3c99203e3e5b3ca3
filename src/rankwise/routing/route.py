"""route: rows of one batch belong to different adapters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rankwise.adapted.adapted import Adapted
from rankwise.adapted.slot import Slot
from rankwise.errors import RoutingError
from rankwise.routing.router import Router
from rankwise.routing.rows import Rows


@contextmanager
def route(model: nn.Module, rows: Iterable[str | None]) -> Iterator[None]:
    """Let each row of a batch run with an adapter of its own: ``with route(model, ["french", None]): model(**batch)``.

    The named adapters take part whether or not they are active, and those that are not frozen (``trainable=False``) are
    trained from then on, until :func:`rankwise.activate` is called. ``backward`` may be called after the block, also
    with gradient checkpointing. ``rankwise.disabled(model)`` inside wins. For one thread at a time.

    Args:
        rows: one adapter name a row of the batch; None for the pretrained model, bit for bit. A row is a sequence that
            the model sees: for ``generate`` with beams or several sequences a prompt, name each prompt's adapter that
            many times.

    Raises:
        AttachError: no such adapter, or the model carries none or is merged.
        RoutingError: no rows, a block inside another, adapters that rows cannot have apart; inside the block, a batch
            with another number of rows, or a layer whose input does not tell them apart.

    >>> import torch, rankwise as rw
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> for name in ("french", "legal"):
    ...     model = rw.attach(model, rw.LoRA(rank=2), name=name)
    >>> with rw.route(model, ["french", "legal", None]):
    ...     y = model(torch.ones(3, 4))
    """
    adapted = Adapted.of(model)
    checked = Rows(_checked(adapted, rows))
    router = _router(adapted)
    if router.rows is not None:
        raise RoutingError("a block of rankwise.route is open already: name all rows there, or leave it first")
    for slot in adapted.slots.values():
        slot.router = router
        _let_train(slot, checked.adapters, adapted.trainable)
    handle = adapted.root.register_forward_pre_hook(_BatchCheck(router, len(checked.names)), with_kwargs=True)
    router.open(checked)
    try:
        yield
    finally:
        router.close()
        handle.remove()


def _checked(adapted: Adapted, rows: Iterable[str | None]) -> list[str | None]:
    if isinstance(rows, str):
        raise RoutingError(f"rows: expected one adapter name a row of the batch, found the text {rows!r}: [{rows!r}]")
    names = [None if row is None else adapted.adapter_name(row) for row in rows]
    adapted.check_unmerged()
    if not names:
        raise RoutingError("rows: expected one adapter name (or None) a row of the batch, found none")
    for path, whole in adapted.whole_modules.items():
        for name in names:
            if name is not None and name in whole.copies:
                raise RoutingError(
                    f"{path}: adapter {name!r} has a copy of this module's tensors (modules_to_save, bias), which rows "
                    f"cannot have apart; activate it and run its rows in a batch of their own"
                )
        if whole.active is not None:
            raise RoutingError(
                f"{path}: the active adapter {whole.active!r} has a copy of this module's tensors (modules_to_save, "
                f"bias), which every row would get; activate an adapter without one first"
            )
    if adapted.folded and len(set(names)) > 1:
        raise RoutingError(
            "an adapter with anchor='fold' changed the base weights, so no row can have the pretrained model; attach "
            "it with anchor='frozen'"
        )
    return names


def _router(adapted: Adapted) -> Router:
    """The model's router, which remembers earlier blocks; or a new one."""
    routers = (slot.router for slot in adapted.slots.values())
    return next((router for router in routers if isinstance(router, Router)), None) or Router()


def _let_train(slot: Slot, names: Iterable[str], trainable: dict[str, bool]) -> None:
    """Train those of the named adapters that are here and were not trained before."""
    new = [name for name in names if name in slot.adapters and name not in (*slot.active, *slot.routed)]
    for name in new:
        slot.adapters[name].requires_grad_(trainable[name])
    slot.routed = (*slot.routed, *new)


class _BatchCheck:
    """A forward pre-hook of the model: its inputs must have as many rows as were named."""

    def __init__(self, router: Router, count: int) -> None:
        self.router = router
        self.count = count

    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        if tensors and self.count not in [tensor.shape[0] for tensor in tensors]:
            raise RoutingError(
                f"rankwise.route was given {self.count} rows, the batch has {len(tensors[0])}; expected one adapter "
                f"name (or None) for each sequence that the model sees: with beams or several sequences a prompt, name "
                f"each prompt's adapter that many times"
            )
        sequences = [t for t in tensors if t.dim() > 2 or (t.dim() == 2 and not t.is_floating_point())]
        self.router.length = sequences[0].shape[1] if sequences else None
