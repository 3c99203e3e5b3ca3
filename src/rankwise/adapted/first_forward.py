"""The first forwards after an attach: a weight that is used past its layer's forward is used without its adapter.

Which weights products read is watched in the forwards 1, 2, 4, 8, … until every layer with an adapter has run. A layer
that has not, and whose weight nothing read, was not wanted: an expert that no token chose, another task's head.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rankwise.adapted.slot import Slot, remove_hook
from rankwise.errors import SiteNeverFired
from rankwise.in_place import is_transformed
from rankwise.sites import ADAPTED, SLOT
from rankwise.weight_reads import WeightReads


def watch_first_forward(root: nn.Module) -> None:
    """Check in the forwards to come that none goes past a layer."""
    vars(root)[ADAPTED].forwards = 0
    if _begin not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(_begin)
        root.register_forward_hook(_end, always_call=True)


def end_watch(root: nn.Module) -> None:
    """Take the hooks off."""
    remove_hook(root, _begin)
    remove_hook(root, _end)


def _begin(root: nn.Module, args: Any) -> None:
    if is_transformed():
        return
    WeightReads.ended(root)
    adapted = vars(root)[ADAPTED]
    adapted.forwards += 1
    if adapted.forwards & (adapted.forwards - 1) == 0:
        WeightReads(root, _idle(root, adapted.slots)).begin()


def _end(root: nn.Module, args: Any, output: Any) -> None:
    """After a forward of the model, or an error in it."""
    reads = None if torch.compiler.is_compiling() else WeightReads.ended(root)
    if reads is None or output is None:  # an error in the forward
        return
    adapted = vars(root)[ADAPTED]
    for path in [path for path in _idle(root, adapted.slots).keys() & reads.read if not adapted.leave_out(path)]:
        adapted.forwards = 0  # the next one is no better
        raise SiteNeverFired(
            f"{path}: a forward of the model went past this layer (its weight is used directly, as "
            f"nn.MultiheadAttention does with out_proj), so an adapter here would do nothing; "
            f"detach and name it in exclude_modules"
        )
    if all(slot.fired for slot in adapted.slots.values()):
        end_watch(root)


def _idle(root: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Path → layer whose slot has not run; a merged model's are not on their layers."""
    layers = {path: root.get_submodule(path) for path in paths}
    slots = {path: layer._modules.get(SLOT) for path, layer in layers.items()}  # of a replica its own
    return {path: layers[path] for path, slot in slots.items() if isinstance(slot, Slot) and not slot.fired}
