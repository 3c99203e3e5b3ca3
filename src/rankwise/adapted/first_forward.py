"""The first forward after an attach: a layer whose surroundings run must run itself, or its adapter would do nothing.

Hooks tell bypassed layers from unused ones, such as an expert that no token chose. They come off once every layer with
an adapter has run.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rankwise.adapted.slot import Slot, remove_hook
from rankwise.errors import SiteNeverFired
from rankwise.sites import ADAPTED, SLOT, base_modules


def watch_first_forward(root: nn.Module, slots: Iterable[Slot]) -> None:
    """Check in the forwards to come that none goes past a layer."""
    parents = {root.get_submodule(slot.site_name.rpartition(".")[0]) for slot in slots if not slot.fired}
    for parent in parents:
        if _mark_reached not in parent._forward_pre_hooks.values():
            parent.register_forward_pre_hook(_mark_reached)
    if parents and _check_fired not in root._forward_hooks.values():
        root.register_forward_hook(_check_fired)


def end_watch(root: nn.Module) -> None:
    """Take the hooks off."""
    remove_hook(root, _check_fired)
    for module in base_modules(root).values():
        remove_hook(module, _mark_reached)


def _mark_reached(parent: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for layer in parent.children():
        slot = layer._modules.get(SLOT)
        if isinstance(slot, Slot):
            slot.reached = True


def _check_fired(root: nn.Module, args: Any, output: Any) -> None:
    """After a whole forward of the model."""
    if torch.compiler.is_compiling():
        return
    slots: Mapping[str, Slot] = vars(root)[ADAPTED].slots
    idle = [slot for slot in slots.values() if not slot.fired]
    for slot in idle:
        if slot.reached:
            raise SiteNeverFired(
                f"{slot.site_name}: a forward of the model went past this layer (its weight is used directly, as "
                f"nn.MultiheadAttention does with out_proj), so an adapter here would do nothing; "
                f"detach and name it in exclude_modules"
            )
    if not idle:
        end_watch(root)
