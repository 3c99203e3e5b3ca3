"""Slot: adapters hang on an untouched layer by a child module and one forward hook.

The layer keeps its class, its keys and its quantised kernel.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.placement import check_in_memory, check_nested, check_output
from rankwise.sites import SLOT
from rankwise.token_rows import TiedRows
from rankwise.variants.base import AdapterLayer, WeightChange


class Slot(nn.Module):
    """The named adapters of one layer.

    Attributes:
        site_name: path of the layer.
        adapters: name → adapter layer.
        active: names that take part in the forward, in this order: changes of the weight before bottlenecks, which act
            on the output of the layer so changed.
        enabled: False inside ``disabled(model)``.
        router: what decides in the active adapters' stead (:class:`rankwise.routing.router.Router`), or None.
        routed: names that routes have let be trained since the last :meth:`activate`.
        fired: whether the layer's forward has run with this slot, or been compiled.
    """

    def __init__(self, site_name: str) -> None:
        super().__init__()
        self.site_name = site_name
        self.adapters = cast(dict[str, AdapterLayer], nn.ModuleDict())  # which behaves like one
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.router: Callable[[Slot, nn.Module, Tensor, Tensor], Tensor] | None = None
        self.routed: tuple[str, ...] = ()
        self.fired = False

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y with the active adapters' parts."""
        if torch.compiler.is_compiling():
            _will_fire(self)
        else:
            if not self.fired:
                self.fired = True
            if y.is_nested:
                check_nested(self, self.site_name, y)
        if not self.enabled:
            return y
        return self.router(self, layer, x, y) if self.router else self.add(layer, x, y, self.active)

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, names: Iterable[str]) -> Tensor:
        """y with these adapters' parts."""
        for name in names:
            y = self.adapters[name].adapt(layer, x, y)
        return y

    @property
    def follows(self) -> bool:
        """Whether all that is on this layer is another's, to whose weight its own is tied."""
        return bool(self.active) and all(isinstance(self.adapters[name], TiedRows) for name in self.active)

    def check_together(self, names: Iterable[str]) -> None:
        """Refuse adapters that cannot be active together here.

        Raises:
            AttachError: one of several changes of the weight cannot be added to others.
        """
        layers = [self.adapters[name] for name in names if name in self.adapters]
        changes = [layer for layer in layers if isinstance(layer, WeightChange)]
        alone = [type(layer).__name__ for layer in changes if not layer.additive]
        if alone and len(changes) > 1:
            raise AttachError(
                f"{self.site_name}: {len(changes)} adapters cannot be active together here, as one is a {alone[0]}: "
                f"what it adds depends on the whole weight, others' changes included; expected it alone: merge one "
                f"adapter, then attach or load the other on top"
            )

    def activate(self, names: Iterable[str], trainable: Mapping[str, bool]) -> None:
        """Let those of the named adapters that are here take part, and train only them; others are not touched."""
        present = [name for name in names if name in self.adapters]
        for name in {*self.active, *self.routed, *present}:
            self.adapters[name].requires_grad_(name in present and trainable[name])
        self.routed = ()
        self.active = tuple(sorted(present, key=lambda name: not isinstance(self.adapters[name], WeightChange)))

    def put_on(self, layer: nn.Module) -> "Slot":
        """Hang on a layer."""
        layer.add_module(SLOT, self)
        layer.register_forward_hook(_add_adapters, with_kwargs=True)
        return self

    def take_off(self, layer: nn.Module) -> None:
        """Leave the layer as it was before :meth:`put_on`."""
        layer._modules.pop(SLOT, None)
        remove_hook(layer, _add_adapters)


@torch.compiler.assume_constant_result
def _will_fire(slot: Slot) -> None:
    """Called once, when the layer is compiled: a compiled layer runs nothing that could say that it has run."""
    slot.fired = True


def slot_on(layer: nn.Module, site_name: str) -> Slot:
    """The layer's slot: the one it has, or a new one."""
    slot = layer._modules.get(SLOT)
    return slot if isinstance(slot, Slot) else Slot(site_name).put_on(layer)


def _add_adapters(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """The forward hook. A function of the module, so that it survives deepcopy and pickle."""
    slot: Any = layer._modules[SLOT]
    if not torch.compiler.is_compiling():
        check_output(slot.site_name, output)
        if "forward" in vars(layer):  # as accelerate's offloading has it; it would move what the slot is called with
            check_in_memory(slot, slot.site_name)
    x = args[0] if args else next(iter(kwargs.values()))  # "input", or "x" for a Conv1D
    return slot(layer, x, output)  # type: ignore[no-any-return]


def remove_hook(module: nn.Module, hook: Any) -> None:
    """Remove a hook by its function: handles do not survive a deepcopy, functions do."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, registered in hooks.items() if registered is hook]:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
