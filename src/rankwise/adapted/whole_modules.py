"""Tensors trained whole beside an adapter, a module's or its bias alone: copies in the originals' places for a while.

The module keeps its class, its name and its forward; only what its ``weight`` refers to changes. So nothing is wrapped
and no hook runs, and the original tensors come back as the very same objects.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.sites import SLOT, WHOLE, base_modules

# Name of a tensor to train whole → the value to start from, or None for the model's own.
StartingValues = Mapping[str, Tensor | None]


class Tensors(nn.Module):
    """Some of the parameters and buffers that one module owns itself, under their names."""

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.take(module, names)

    def take(self, module: nn.Module, names: Iterable[str]) -> None:
        """Have these too, as the module holds them now."""
        for name in names:
            if name in module._parameters:
                self.register_parameter(name, module._parameters[name])
            else:
                persistent = name not in module._non_persistent_buffers_set
                self.register_buffer(name, module._buffers[name], persistent=persistent)

    @property
    def names(self) -> list[str]:
        """Of the tensors."""
        return [*self._parameters, *self._buffers]


class WholeModule(nn.Module):
    """One module's original tensors and the adapters' trained copies of them, or of some of them; its child.

    Attributes:
        path: of the module.
        original: what the module came with, of the tensors that some copy takes the place of.
        copies: adapter name → trained copy.
        active: whose copy is trained and takes part in the forward; None: the original does.
        shown: whose copy the module holds now; None: the original, as inside ``disabled(model)``.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.original = Tensors(module, ())
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
        for key in self.original._buffers:  # a forward may have replaced them
            self._holder(self.shown, key)._buffers[key] = module._buffers[key]
        self.shown = name
        for key in self.original._parameters:
            module._parameters[key] = self._holder(name, key)._parameters[key]
        for key in self.original._buffers:
            module._buffers[key] = self._holder(name, key)._buffers[key]

    def _holder(self, name: str | None, key: str) -> nn.Module:
        """Who has the tensor of this name: the named copy, if it has one, else the original."""
        copy = None if name is None else cast(Tensors, self.copies[name])
        return self.original if copy is None or key not in copy.names else copy


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


def base_tensors(path: str, module: nn.Module) -> Iterator[str]:
    """Names in the model of all tensors that a module has, without the copies of them."""
    for inner, part in base_modules(module).items():
        for name in (*part._parameters, *part._buffers):
            yield ".".join(filter(None, (path, inner, name)))


def base_state(path: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors without the copies of them, by their names in the model's state dict."""
    return {
        ".".join(filter(None, (path, inner, name))): tensor
        for inner, part in base_modules(module).items()
        for name, tensor in Tensors(part, [*part._parameters, *part._buffers]).state_dict(keep_vars=True).items()
    }


def add_copies(root: nn.Module, name: str, values: StartingValues, apart: Collection[int] = ()) -> None:
    """Give the adapter its own copy of each tensor.

    Args:
        apart: ids of tied tensors that are copied for each module that has them.
    """
    memo: dict[int, Any] = {}  # tensors that are tied stay tied
    by_module: dict[str, dict[str, Tensor | None]] = {}
    for tensor_name, value in values.items():
        path, _, key = tensor_name.rpartition(".")
        by_module.setdefault(path, {})[key] = value
    for path, tensors in by_module.items():
        module = root.get_submodule(path)
        if WHOLE not in module._modules:
            module.add_module(WHOLE, WholeModule(path, module))
        whole = cast(WholeModule, module._modules[WHOLE])
        whole.original.take(module, [key for key in tensors if key not in whole.original.names])
        copy = deepcopy(Tensors(whole.original, tensors), memo)
        for tensor in apart:
            memo.pop(tensor, None)
        copy.load_state_dict({key: value for key, value in tensors.items() if value is not None}, strict=False)
        whole.copies[name] = copy
