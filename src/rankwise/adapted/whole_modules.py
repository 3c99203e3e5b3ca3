"""Modules trained whole beside an adapter: copies of their tensors that take the originals' places for a while.

The module keeps its class, its name and its forward; only what its ``weight`` refers to changes. So nothing is wrapped
and no hook runs, and the original tensors come back as the very same objects.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.sites import SAVED, SLOT


class Tensors(nn.Module):
    """The parameters and buffers that one module owns itself, under their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)


class SavedTensors(nn.Module):
    """One module's original tensors and the adapters' trained copies of them; its child.

    Attributes:
        path: of the module.
        original: what the module came with.
        copies: adapter name → trained copy.
        shown: whose copy the module holds now; None: the original.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.original = Tensors(module)
        self.copies = nn.ModuleDict()
        self.shown: str | None = None

    def show(self, module: nn.Module, name: str | None) -> None:
        """Let ``module``, whose child this is, hold the named copy, or the original."""
        self._holder(self.shown)._buffers.update(module._buffers)  # a forward may have replaced them
        holder, self.shown = self._holder(name), name
        module._parameters.update(holder._parameters)
        module._buffers.update(holder._buffers)

    def _holder(self, name: str | None) -> nn.Module:
        return self.original if name is None else self.copies[name]


def saved_tensors(model: nn.Module) -> dict[str, SavedTensors]:
    """Module path → its originals and copies, in the model's order."""
    return {module.path: module for module in model.modules() if isinstance(module, SavedTensors)}


def check_copyable(path: str, module: nn.Module) -> None:
    """Refuse a module whose tensors cannot be trained as they are.

    Raises:
        AttachError: a tensor is not floating point (a quantised layer), or an adapter sits inside.
    """
    for name, parameter in module.named_parameters():
        if SAVED in name.split("."):
            continue
        if not parameter.is_floating_point():
            raise AttachError(
                f"{path}: {name} is {parameter.dtype}, which cannot be trained whole; load it unquantised"
            )
        if SLOT in name.split("."):
            raise AttachError(
                f"{path}: an adapter sits inside ({name}); detach it, or take {path} from modules_to_save"
            )


def add_copies(model: nn.Module, name: str, modules: Mapping[str, Mapping[str, Tensor] | None]) -> None:
    """Give the adapter its own copy of each module (path → values to start from, or None for the module's own)."""
    memo: dict[int, Any] = {}  # tensors that are tied stay tied
    for path, values in modules.items():
        for owner_path, owner in _owners(path, model.get_submodule(path)):
            saved = owner._modules.get(SAVED)
            if saved is None:
                saved = SavedTensors(owner_path, owner)
                owner.add_module(SAVED, saved)
            assert isinstance(saved, SavedTensors)
            copy = deepcopy(saved.original, memo)
            if values is not None:
                prefix = owner_path.removeprefix(path).removeprefix(".")
                copy.load_state_dict({key: values[f"{prefix}.{key}".removeprefix(".")] for key in copy.state_dict()})
            saved.copies[name] = copy


def _owners(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules from ``path`` down that own tensors themselves: never a mere container such as nn.Sequential."""
    return [
        (f"{path}.{name}".removesuffix("."), owner)
        for name, owner in module.named_modules()
        if (owner._parameters or owner._buffers) and SAVED not in name.split(".")
    ]


def show_copies(model: nn.Module, names: Iterable[str], trainable: Mapping[str, bool]) -> None:
    """Let each module hold the copy of that one of the named adapters which has one, and only it be trained.

    Raises:
        AttachError: two of the adapters have a copy of one module. Nothing is changed then.
    """
    wanted = {path: [name for name in names if name in saved.copies] for path, saved in saved_tensors(model).items()}
    for path, found in wanted.items():
        if len(found) > 1:
            raise AttachError(f"{path}: adapters {found} each have a whole copy of it; activate one of them")
    for path, saved in saved_tensors(model).items():
        shown = next(iter(wanted[path]), None)
        saved.show(model.get_submodule(path), shown)
        for name, copy in saved.copies.items():
            copy.requires_grad_(name == shown and trainable[name])


def show_originals(model: nn.Module) -> None:
    """Let each module hold what it came with."""
    for path, saved in saved_tensors(model).items():
        saved.show(model.get_submodule(path), None)


def drop_copies(model: nn.Module, name: str) -> None:
    """Forget one adapter's copies; a module with none left is as it was."""
    for path, saved in saved_tensors(model).items():
        if name in saved.copies:
            if saved.shown == name:
                saved.show(model.get_submodule(path), None)
            del saved.copies[name]
        if not saved.copies:
            remove_saved(model, saved)


def remove_saved(model: nn.Module, saved: SavedTensors) -> None:
    """Take the copies off a module, which keeps what it shows."""
    del model.get_submodule(saved.path)._modules[SAVED]


def copied_values(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's trained copies, by their names in the model's own state dict."""
    return {
        f"{path}.{key}": value
        for path, saved in saved_tensors(model).items()
        if name in saved.copies
        for key, value in saved.copies[name].state_dict().items()
    }
