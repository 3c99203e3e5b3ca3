"""Slots: adapters hang on untouched layers by a child module and one forward hook.

A layer keeps its class, its keys and its quantised kernel. What the library knows about a model is in its slots (one
per adapted layer) and in one plain record on the module that ``attach`` was called with.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapted.whole_modules import add_copies, remove_saved, saved_tensors, show_copies, show_originals
from rankwise.errors import AttachError, SiteNeverFired
from rankwise.methods import nearest
from rankwise.sites import SLOT
from rankwise.spec import LoRA
from rankwise.variants.base import AdapterLayer, FoldableLayer

_RECORD = "_rankwise_record"  # the plain attribute on the model
_RAN = "_rankwise_ran"  # a mark on the parents of sites, during the first forward


class Slot(nn.Module):
    """The named adapters of one layer.

    Attributes:
        adapters: name → adapter layer.
        active: names that take part in the forward, in this order: changes of the weight before bottlenecks, which act
            on the output of the layer so changed.
        enabled: False inside ``disabled(model)``.
        fired: whether the layer's forward has run with this slot.
        original: the base weight as it was, where ``anchor="fold"`` has put another in its place.
    """

    def __init__(self, site_name: str) -> None:
        super().__init__()
        self.site_name = site_name
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.fired = False
        self.original: Tensor | None = None

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y with the active adapters' parts."""
        if not self.fired and not torch.compiler.is_compiling():
            self.fired = True
        if self.enabled:
            for name in self.active:
                y = self.adapters[name].adapt(layer, x, y)  # type: ignore[operator]
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Slot":
        """``model.to(...)`` takes the original along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.original is not None:
            self.original = fn(self.original)
        return self

    def layers(self) -> dict[str, AdapterLayer]:
        """Name → adapter layer."""
        return {name: layer for name, layer in self.adapters.items() if isinstance(layer, AdapterLayer)}

    def active_changes(self) -> list[FoldableLayer]:
        """The active adapters that are changes of the weight."""
        return [found for name in self.active if isinstance(found := self.adapters[name], FoldableLayer)]


@dataclass
class Record:
    """What is known of a model as a whole.

    Attributes:
        specs: adapter name → its spec.
        trainable: adapter name → whether it is trained when active.
        base_flags: parameter name → requires_grad before the first attach.
        merged: what ``merge`` put aside: (layer path, base weight, slot).
    """

    specs: dict[str, LoRA] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    base_flags: dict[str, bool] = field(default_factory=dict)
    merged: list[tuple[str, Tensor, Slot]] = field(default_factory=list)


def find_record(model: nn.Module) -> tuple[nn.Module, Record] | None:
    """The module that carries the record (inside wrappers such as DDP or torch.compile's), and the record."""
    for module in model.modules():
        record = module.__dict__.get(_RECORD)
        if record is not None:
            return module, record
    return None


def root(model: nn.Module) -> nn.Module:
    """The module that carries the record, or would: a model that ``torch.compile`` wrapped is that inside."""
    found = find_record(model)
    return found[0] if found else getattr(model, "_orig_mod", model)


def forget_compiled() -> None:
    """Let compiled models be compiled anew: torch does not look whether hooks came or went since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def host(model: nn.Module) -> tuple[nn.Module, Record]:
    """Like :func:`find_record` on a model that must carry an adapter.

    Raises:
        AttachError: nothing is attached.
    """
    found = find_record(model)
    if found is None:
        raise AttachError("this model carries no adapter: call rankwise.attach(model, spec) or rankwise.load first")
    return found


def adapter_name(model: nn.Module, name: str | None) -> str:
    """The given adapter name if the model has it; with None the only active one.

    Raises:
        AttachError: no such adapter, or None where several are active or none is; the model is merged.
    """
    check_unmerged(model)
    _, record = host(model)
    if name is None:
        active = list(dict.fromkeys(name for slot in slots(model).values() for name in slot.active))
        if len(active) != 1:
            raise AttachError(f"name one adapter: {len(active)} are active, the model has {sorted(record.specs)}")
        return active[0]
    if name not in record.specs:
        raise AttachError(
            f"no adapter {name!r} on this model, it has {sorted(record.specs)}{nearest(name, record.specs)}"
        )
    return name


def active_specs(model: nn.Module) -> dict[str, LoRA]:
    """Name → spec of the active adapters; none where the model carries none."""
    found = find_record(model)
    active = dict.fromkeys(name for slot in slots(model).values() for name in slot.active)
    return {name: found[1].specs[name] for name in active} if found else {}


def check_new_name(model: nn.Module, name: Any) -> None:
    """Refuse a name under which no new adapter can be put on this model.

    Raises:
        AttachError: the name is malformed or taken, or the model can carry no adapter now.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AttachError(
            f"adapter name {name!r} cannot be used: it must be non-empty, without dots, and not the name of a method "
            f"of torch.nn.ModuleDict; choose another"
        )
    found = find_record(model)
    if found is None:
        if slots(model):
            raise AttachError(
                f"this module is a part of a model that carries adapters (at {next(iter(slots(model)))!r}, ...); "
                f"attach to the whole model, as before"
            )
        return
    if found[1].merged:
        raise AttachError("this model is merged: call rankwise.unmerge(model) or rankwise.detach(model) first")
    if name in found[1].specs:
        raise AttachError(
            f"this model already carries an adapter {name!r}: give this one another name, or detach that one first"
        )
    if any(slot.original is not None for slot in slots(model).values()):
        raise AttachError(
            "this model carries an adapter with anchor='fold', which changed the base weights and so must stay the "
            "only one; detach it, or attach it with anchor='frozen'"
        )


def check_unmerged(model: nn.Module) -> None:
    """Refuse a merged model: its adapters are put aside.

    Raises:
        AttachError: the model is merged, or carries no adapter.
    """
    if host(model)[1].merged:
        raise AttachError("this model is merged, its adapters are put aside: call rankwise.unmerge(model) first")


def slots(model: nn.Module) -> dict[str, Slot]:
    """Site name → slot, in the model's order."""
    return {m.site_name: m for m in model.modules() if isinstance(m, Slot)}


def adapter_layers(model: nn.Module, name: str) -> dict[str, AdapterLayer]:
    """Site name → the named adapter's layer there."""
    return {site: slot.layers()[name] for site, slot in slots(model).items() if name in slot.adapters}


def install(
    model: nn.Module,
    name: str,
    spec: LoRA,
    layers: Mapping[str, AdapterLayer],
    *,
    trainable: bool,
    saved: Mapping[str, Mapping[str, Tensor] | None] = MappingProxyType({}),
) -> None:
    """Put built adapter layers on their sites, freeze the base and make the adapter the active one.

    Args:
        saved: modules to train whole, with the values to start from or None for their own.
    """
    forget_compiled()
    found = find_record(model)
    owner, record = found if found else (root(model), Record())
    if found is None:
        record.base_flags = {path: p.requires_grad for path, p in owner.named_parameters()}
        setattr(owner, _RECORD, record)
        owner.requires_grad_(False)
    for path, adapter in layers.items():
        layer = owner.get_submodule(path)
        slot = getattr(layer, SLOT, None)
        if slot is None:
            slot = Slot(path)
            layer.add_module(SLOT, slot)
            layer.register_forward_hook(_add_adapters, with_kwargs=True)
        adapter.train(layer.training)
        slot.adapters[name] = adapter
    add_copies(owner, name, saved)
    record.specs[name] = spec
    record.trainable[name] = trainable
    _watch(owner, layers)
    set_active(model, (name,))


def set_active(model: nn.Module, names: tuple[str, ...]) -> None:
    """Let these adapters, in this order, take part in the forward, and only them be trained.

    Raises:
        AttachError: a site would have several, one of which cannot be added to others. Nothing is changed then.
    """
    owner, record = host(model)
    for path, slot in slots(model).items():
        _check_additive(path, [layer for name, layer in slot.layers().items() if name in names])
    show_copies(owner, names, record.trainable)
    for slot in slots(model).values():
        here = [n for n in names if n in slot.adapters]
        slot.active = tuple(sorted(here, key=lambda n: not isinstance(slot.adapters[n], FoldableLayer)))
        for name, layer in slot.adapters.items():
            layer.requires_grad_(record.trainable[name] and name in names)


def _check_additive(path: str, layers: list[AdapterLayer]) -> None:
    changes = [layer for layer in layers if isinstance(layer, FoldableLayer)]
    alone = [type(layer).__name__ for layer in changes if not layer.additive]
    if alone and len(changes) > 1:
        raise AttachError(
            f"{path}: {len(changes)} adapters cannot be active together here, as one is a {alone[0]}: what it adds "
            f"depends on the whole weight, others' changes included; expected it alone: merge one adapter, then attach "
            f"or load the other on top"
        )


def uninstall(model: nn.Module) -> None:
    """Take all slots and hooks off, give the base its flags back. Base weights are left as they are.

    A module that was trained whole keeps what it shows.
    """
    forget_compiled()
    owner, record = host(model)
    for saved in saved_tensors(owner).values():
        remove_saved(owner, saved)
    for path in slots(owner):
        remove_slot(owner.get_submodule(path))
    _unwatch(owner)
    for path, parameter in owner.named_parameters():
        if path in record.base_flags:  # a parameter that came later keeps what it was given
            parameter.requires_grad_(record.base_flags[path])
    delattr(owner, _RECORD)


def remove_slot(layer: nn.Module) -> Slot:
    """Take one layer's slot and hook off."""
    slot = layer._modules.pop(SLOT)
    assert isinstance(slot, Slot)
    _remove_hook(layer, _add_adapters)
    return slot


def put_slot(layer: nn.Module, slot: Slot) -> None:
    """Put a slot that :func:`remove_slot` took off back on its layer."""
    layer.add_module(SLOT, slot)
    layer.register_forward_hook(_add_adapters, with_kwargs=True)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The pretrained model for a moment: bit for bit, whatever the start."""
    found = list(slots(model).values())
    owner = host(model)[0] if found else model
    before = [slot.enabled for slot in found]
    shown = {path: saved.shown for path, saved in saved_tensors(owner).items()}
    try:
        show_originals(owner)
        for slot in found:
            if slot.enabled:
                slot.enabled = False
                _swap_original(owner, slot)
        yield
    finally:
        for slot, enabled in zip(found, before, strict=True):
            if enabled:
                slot.enabled = True
                _swap_original(owner, slot)
        for path, saved in saved_tensors(owner).items():
            saved.show(owner.get_submodule(path), shown[path])


def _swap_original(owner: nn.Module, slot: Slot) -> None:
    if slot.original is not None:
        weight: Any = owner.get_submodule(slot.site_name).weight
        weight.data, slot.original = slot.original, weight.data


def _add_adapters(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """The forward hook. A function of the module, so that it survives deepcopy and pickle."""
    slot: Any = layer._modules[SLOT]
    x = args[0] if args else next(iter(kwargs.values()))  # "input", or "x" for a Conv1D
    return slot(layer, x, output)  # type: ignore[no-any-return]


def _watch(owner: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Look during the first forward which sites' parents ran, to tell bypassed sites from unused ones."""
    _unwatch(owner)
    for path in layers:
        parent = owner.get_submodule(path.rpartition(".")[0])
        if parent is not owner and _mark_ran not in parent._forward_pre_hooks.values():
            parent.register_forward_pre_hook(_mark_ran)
    owner.register_forward_hook(_check_fired)


def _mark_ran(parent: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        setattr(parent, _RAN, True)


def _check_fired(owner: nn.Module, args: Any, output: Any) -> None:
    """After a whole forward: a site whose parent ran must have run itself. An expert that no token chose has not."""
    if torch.compiler.is_compiling():
        return
    idle = [path for path, slot in slots(owner).items() if not slot.fired]
    for path in idle:
        parent = owner.get_submodule(path.rpartition(".")[0])
        if parent is owner or getattr(parent, _RAN, False):
            raise SiteNeverFired(
                f"{path}: a forward of the model went past this layer (its weight is used directly, as "
                f"nn.MultiheadAttention does with out_proj), so an adapter here would do nothing; "
                f"detach and name it in exclude_modules"
            )
    if not idle:
        _unwatch(owner)


def _unwatch(owner: nn.Module) -> None:
    _remove_hook(owner, _check_fired)
    for module in owner.modules():
        if _remove_hook(module, _mark_ran):
            module.__dict__.pop(_RAN, None)


def _remove_hook(module: nn.Module, hook: Any) -> bool:
    """Remove a hook by its function: handles do not survive a deepcopy, functions do."""
    removed = False
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, found in hooks.items() if found is hook]:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            removed = True
    return removed
