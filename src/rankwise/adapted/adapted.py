"""Adapted: a model that carries adapters, and all that is known of it, in one object."""

import logging
import sys
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapted.first_forward import end_watch, watch_first_forward
from rankwise.adapted.slot import Slot, slot_on
from rankwise.adapted.whole_modules import StartingValues, WholeModule, add_copies
from rankwise.errors import AttachError
from rankwise.layers.kinds import kind_of
from rankwise.methods import nearest
from rankwise.placement import check_in_memory
from rankwise.sites import ADAPTED, SLOT, WHOLE, base_modules
from rankwise.spec import LoRA
from rankwise.variants.base import AdapterLayer, FoldableLayer

log = logging.getLogger("rankwise")


@dataclass(eq=False, repr=False)
class Adapted:
    """A model that carries adapters.

    It is a plain attribute of the model, so copies and pickles of the model have their own. It refers to the model
    weakly, or a model of many GB would wait for Python's garbage collector after its last use.

    Attributes:
        base_flags: parameter name → requires_grad before the first attach.
        base_shapes: path of each linear layer and embedding → its (out, in) then.
        specs: adapter name → its spec.
        trainable: adapter name → whether it is trained when active.
        active: names of the active adapters, in the order in which they were named.
        enabled: False inside ``disabled(model)``.
        slots: site name → slot, in the model's order.
        whole_modules: path → module trained whole, in the model's order.
        folded: site name → the weight that ``anchor="fold"`` put aside: W₀, or inside ``disabled(model)`` W₀ − sB₀A₀.
        merged: site name → the weight that ``merge`` put aside. The slots are off their layers then.
        forwards: how many there were since the last adapter came, as long as some layer with one has not run.
    """

    base_flags: Mapping[str, bool]
    base_shapes: Mapping[str, tuple[int, int]]
    specs: dict[str, LoRA] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    slots: dict[str, Slot] = field(default_factory=dict)
    whole_modules: dict[str, WholeModule] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)
    forwards: int = 0
    _root: "weakref.ref[nn.Module] | None" = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_root": None}  # the copy's is another

    @property
    def root(self) -> nn.Module:
        """The module that ``attach`` was called with. Paths start there."""
        root = self._root() if self._root else None
        assert root is not None
        return root

    @staticmethod
    def find(model: nn.Module) -> "Adapted | None":
        """That of a model or of the one inside its wrapper (DDP's, torch.compile's); None without adapters."""
        for module in model.modules():  # lazily, the model first, then what it wraps
            adapted = vars(module).get(ADAPTED)
            if isinstance(adapted, Adapted):
                adapted._root = weakref.ref(module)
                return adapted
        return None

    @staticmethod
    def of(model: nn.Module) -> "Adapted":
        """Like :meth:`find`.

        Raises:
            AttachError: nothing is attached.
        """
        adapted = Adapted.find(model)
        if adapted is None:
            raise AttachError("this model carries no adapter: call rankwise.attach(model, spec) or rankwise.load first")
        return adapted

    @staticmethod
    def ensure(model: nn.Module) -> "Adapted":
        """Like :meth:`find`; a model without adapters is frozen and gets one."""
        if Adapted.find(model) is None:
            root = base_root(model)
            flags = {path: parameter.requires_grad for path, parameter in root.named_parameters()}
            layers = {p: m for p, m in base_modules(root).items() if isinstance(m, nn.Linear | nn.Embedding)}
            setattr(
                root, ADAPTED, Adapted(flags, {path: kind_of(layer).shape(layer) for path, layer in layers.items()})
            )
            root.requires_grad_(False)
        return Adapted.of(model)

    def layer(self, path: str) -> Any:
        """The base's module at this path."""
        return self.root.get_submodule(path)

    def adapter_name(self, name: str | None) -> str:
        """The given adapter name if the model has it; with None the only active one.

        Raises:
            AttachError: no such adapter, or None where several are active or none is; the model is merged.
        """
        self.check_unmerged()
        if name is None:
            active = self.active
            if len(active) != 1:
                raise AttachError(f"name one adapter: {len(active)} are active, the model has {sorted(self.specs)}")
            return active[0]
        if name not in self.specs:
            raise AttachError(
                f"no adapter {name!r} on this model, it has {sorted(self.specs)}{nearest(name, self.specs)}"
            )
        return name

    def adapter_layers(self, name: str) -> dict[str, AdapterLayer]:
        """Site name → the named adapter's layer there."""
        return {path: slot.adapters[name] for path, slot in self.slots.items() if name in slot.adapters}

    def whole_tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's copies of modules trained whole, by their names in the model's own state dict."""
        return {
            f"{path}.{key}": tensor
            for path, whole in self.whole_modules.items()
            if name in whole.copies
            for key, tensor in whole.copies[name].state_dict().items()
        }

    def check_unmerged(self) -> None:
        """Refuse a merged model: its adapters are put aside.

        Raises:
            AttachError: the model is merged.
        """
        if self.merged:
            raise AttachError("this model is merged, its adapters are put aside: call rankwise.unmerge(model) first")

    def add(
        self,
        name: str,
        spec: LoRA,
        layers: Mapping[str, AdapterLayer],
        whole: StartingValues,
        apart: Collection[int] = (),
        *,
        trainable: bool,
    ) -> None:
        """Put a new adapter (site name → layer, and modules to train whole) on and make it the active one.

        Args:
            apart: see :func:`rankwise.adapted.whole_modules.add_copies`.
        """
        forget_compiled()
        for path, adapter_layer in layers.items():
            layer = self.layer(path)
            slot_on(layer, path).adapters[name] = adapter_layer.train(layer.training)
        add_copies(self.root, name, whole, apart)
        self.specs[name], self.trainable[name] = spec, trainable
        self._collect()
        watch_first_forward(self.root)
        self.activate((name,))

    def _collect(self) -> None:
        """Take stock of the slots and the modules trained whole, in the model's order."""
        children = [module._modules for module in base_modules(self.root).values()]
        self.slots = {slot.site_name: slot for named in children if isinstance(slot := named.get(SLOT), Slot)}
        self.whole_modules = {
            whole.path: whole for named in children if isinstance(whole := named.get(WHOLE), WholeModule)
        }

    def activate(self, names: tuple[str, ...]) -> None:
        """Let these adapters, in this order, take part in the forward, and only them be trained.

        Raises:
            AttachError: they cannot be active together. Nothing is changed then.
        """
        parts: list[Slot | WholeModule] = [*self.slots.values(), *self.whole_modules.values()]
        for part in parts:
            part.check_together(names)
        for part in parts:
            part.activate(names, self.trainable)
        self.active = names
        self._show(self.enabled)

    def _show(self, enabled: bool) -> None:
        """Let adapters take part and modules trained whole hold the active adapter's copy; or neither."""
        for slot in self.slots.values():
            slot.enabled = enabled
        for path, whole in self.whole_modules.items():
            whole.show(self.layer(path), whole.active if enabled else None)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The pretrained model for a moment: bit for bit, whatever the start."""
        if not self.enabled:  # inside another such block
            yield
            return
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)

    def _enable(self, enabled: bool) -> None:
        self.enabled = enabled
        for path, weight in self.folded.items():
            self.folded[path] = self.swap_weight(path, weight)
        self._show(enabled)

    def swap_weight(self, path: str, weight: Tensor) -> Tensor:
        """Put a weight in the place of a layer's, on its device and in its dtype, and return that."""
        layer = self.layer(path)
        previous: Tensor = layer.weight.data
        layer.weight.data = weight.to(previous)  # the model may have moved or been cast since
        return previous

    def remove(self, name: str) -> None:
        """Take one of several adapters off."""
        forget_compiled()
        self.activate(tuple(other for other in self.active if other != name))
        for path, slot in self.slots.items():
            if name in slot.adapters:
                del slot.adapters[name]
            if not slot.adapters:
                slot.take_off(self.layer(path))
        for path, whole in self.whole_modules.items():
            if name in whole.copies:
                del whole.copies[name]
            if not whole.copies:
                del self.layer(path)._modules[WHOLE]
        del self.specs[name], self.trainable[name]
        self._collect()

    def leave_out(self, path: str) -> bool:
        """Take a slot off that does nothing, if all that is on it is from "all-linear" and not trained; else False."""
        for name, layer in self.slots[path].adapters.items():
            trained = not isinstance(layer, FoldableLayer) or bool(layer.delta().norm())
            if trained or self.specs[name].target_modules != "all-linear":
                return False
        log.warning("left out of all-linear: %s, whose weight the model uses without calling the layer", path)
        self.slots.pop(path).take_off(self.layer(path))
        return True

    def restore(self) -> None:
        """Give the model its pretrained tensors back and take everything off."""
        for path, weight in {**self.merged, **self.folded}.items():  # of a folded start, W₀ and not what was merged
            self.swap_weight(path, weight)
        self._show(enabled=False)
        self.uninstall()

    def uninstall(self) -> None:
        """Take everything off and give the base its flags back; its tensors stay those that it holds now."""
        forget_compiled()
        for path, slot in self.slots.items():
            slot.take_off(self.layer(path))
        for path in self.whole_modules:
            del self.layer(path)._modules[WHOLE]
        end_watch(self.root)
        for path, parameter in self.root.named_parameters():  # one that came later keeps what it was given
            parameter.requires_grad_(self.base_flags.get(path, parameter.requires_grad))
        vars(self.root).pop("save_pretrained", None)  # see rankwise.format.save_pretrained; the class has its own
        delattr(self.root, ADAPTED)


def forget_compiled() -> None:
    """Let compiled models be compiled anew: torch does not look whether hooks came or went since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def base_root(model: nn.Module) -> nn.Module:
    """The module whose attribute ``Adapted`` is, or would be: a model that ``torch.compile`` wrapped is that inside."""
    adapted = Adapted.find(model)
    return adapted.root if adapted else getattr(model, "_orig_mod", model)


def switched_off(model: nn.Module) -> AbstractContextManager[None]:
    """The pretrained model for a moment, whether or not it carries adapters."""
    adapted = Adapted.find(model)
    return adapted.switched_off() if adapted else nullcontext()


def active_specs(model: nn.Module) -> dict[str, LoRA]:
    """Name → spec of the active adapters; none where the model carries none."""
    adapted = Adapted.find(model)
    return {name: adapted.specs[name] for name in adapted.active} if adapted else {}


def check_new_name(model: nn.Module, name: Any) -> None:
    """Refuse a name under which no new adapter can be put on this model.

    Raises:
        AttachError: the name is malformed or taken, or the model can carry no adapter now; it is offloaded.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AttachError(
            f"adapter name {name!r} cannot be used: it must be non-empty, without dots, and not the name of a method "
            f"of torch.nn.ModuleDict; choose another"
        )
    check_in_memory(model)
    adapted = Adapted.find(model)
    if adapted is None:
        for module in model.modules():
            if isinstance(module, Slot):
                raise AttachError(
                    f"this module is a part of a model that carries adapters (at {module.site_name!r}, ...); "
                    f"attach to the whole model, as before"
                )
        return
    if adapted.merged:
        raise AttachError("this model is merged: call rankwise.unmerge(model) or rankwise.detach(model) first")
    if name in adapted.specs:
        raise AttachError(
            f"this model already carries an adapter {name!r}: give this one another name, or detach that one first"
        )
    if adapted.folded:
        raise AttachError(
            "this model carries an adapter with anchor='fold', which changed the base weights and so must stay the "
            "only one; detach it, or attach it with anchor='frozen'"
        )
