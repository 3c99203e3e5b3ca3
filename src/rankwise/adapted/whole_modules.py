"""Modules trained whole beside an adapter: copies of their tensors that take the originals' places for a while.

The module keeps its class, its name and its forward; only what its ``weight`` refers to changes. So nothing is wrapped
and no hook runs, and the original tensors come back as the very same objects.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.sites import SLOT, WHOLE, base_modules

# Path of a module to train whole → the values to start from, by their names in it, or None for the module's own.
StartingValues = Mapping[str, Mapping[str, Tensor] | None]


class Tensors(nn.Module):
    """The parameters and buffers that one module owns itself, under their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)


class WholeModule(nn.Module):
    """One module's original tensors and the adapters' trained copies of them; its child.

    Attributes:
        path: of the module.
        original: what the module came with.
        copies: adapter name → trained copy.
        active: whose copy is trained and takes part in the forward; None: the original does.
        shown: whose copy the module holds now; None: the original, as inside ``disabled(model)``.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.original = Tensors(module)
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.shown: str | None = None

    def check_together(self, names: Sequence[str]) -> None:
        """Refuse adapters that cannot be active together.

        Raises:
            AttachError: two of them have a copy of this module.
        """
        copies = [name for name in names if name in self.copies]
        if len(copies) > 1:
            raise AttachError(f"{self.path}: adapters {copies} each have a whole copy of it; activate one of them")

    def activate(self, names: Sequence[str], trainable: Mapping[str, bool]) -> None:
        """Train the copy of that one of the named adapters which has one; others are not touched."""
        active = next((name for name in names if name in self.copies), None)
        for name in (self.active, active):
            if name is not None:
                self.copies[name].requires_grad_(name == active and trainable[name])
        self.active = active

    def show(self, module: nn.Module, name: str | None) -> None:
        """Let ``module``, whose child this is, hold the named copy, or the original."""
        self._holder(self.shown)._buffers.update(module._buffers)  # a forward may have replaced them
        holder, self.shown = self._holder(name), name
        module._parameters.update(holder._parameters)
        module._buffers.update(holder._buffers)

    def _holder(self, name: str | None) -> nn.Module:
        return self.original if name is None else self.copies[name]


def check_copyable(path: str, module: nn.Module) -> None:
    """Refuse a module whose tensors cannot be trained as they are.

    Raises:
        AttachError: a tensor is not floating point (a quantised layer), or an adapter sits inside.
    """
    for inner, part in base_modules(module).items():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_floating_point():
                raise AttachError(
                    f"{path}: {f'{inner}.{name}'.removeprefix('.')} is {parameter.dtype}, which cannot be trained "
                    f"whole; load it unquantised"
                )
        if SLOT in part._modules:
            raise AttachError(
                f"{path}: an adapter sits inside ({inner or path}); detach it, or take {path} from modules_to_save"
            )


def base_state(path: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors without the copies of them, by their names in the model's state dict."""
    return {
        ".".join(filter(None, (path, inner, name))): tensor
        for inner, part in base_modules(module).items()
        for name, tensor in Tensors(part).state_dict(keep_vars=True).items()
    }


def add_copies(root: nn.Module, name: str, modules: StartingValues, apart: Collection[int] = ()) -> None:
    """Give the adapter its own copy of each module.

    Args:
        apart: ids of tied tensors that are copied for each module that has them.
    """
    memo: dict[int, Any] = {}  # tensors that are tied stay tied
    for path, values in modules.items():
        for inner, module in base_modules(root.get_submodule(path)).items():
            if not (module._parameters or module._buffers):
                continue  # a mere container such as nn.Sequential
            if WHOLE not in module._modules:
                module.add_module(WHOLE, WholeModule(f"{path}.{inner}".removesuffix("."), module))
            whole = cast(WholeModule, module._modules[WHOLE])
            copy = deepcopy(whole.original, memo)
            for tensor in apart:
                memo.pop(tensor, None)
            if values is not None:
                copy.load_state_dict({key: values[f"{inner}.{key}".removeprefix(".")] for key in copy.state_dict()})
            whole.copies[name] = copy
