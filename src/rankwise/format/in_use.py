"""Whether what is saved is what the model uses.

A model can be changed under its adapter: a layer replaced, a vocabulary resized, weights tied anew.
"""

from collections.abc import Iterator

import torch
from torch import nn

from rankwise.adapted.adapted import Adapted
from rankwise.adapted.whole_modules import WholeModule
from rankwise.errors import AttachError
from rankwise.layers.kinds import kind_or_none
from rankwise.patterns import keys_under
from rankwise.sites import SLOT, WHOLE, base_modules


def changed_layers(adapted: Adapted, name: str) -> list[str]:
    """Paths of the base's layers that are no longer what its own files hold, and so belong to what is saved.

    They have another size than before the first attach (a vocabulary that has grown), or hold the trained copy of
    another module (a head tied to it anew, by ``tie_weights``). Layers trained whole are left out.

    Raises:
        AttachError: what the named adapter holds for a layer is not what the model uses there.
    """
    modules = base_modules(adapted.root)
    _check_slots(adapted, name, modules)
    for whole in adapted.whole_modules.values():
        if name in whole.copies:
            _check_copy(whole, name, modules)
    saved_whole = set(keys_under(adapted.specs[name].modules_to_save, modules))
    changed = dict.fromkeys([*_resized(adapted, modules), *_tied_to_copies(adapted, name, modules)])
    return [path for path in changed if path not in saved_whole]


def named_along(adapted: Adapted, name: str) -> list[str]:
    """Paths of modules that PEFT takes a name in modules_to_save for, in the middle of a part: it wants their tensors.

    To PEFT "classifier" also names ``pre_classifier``.
    """
    names = adapted.specs[name].modules_to_save
    modules = base_modules(adapted.root)
    ends = [path for path in modules if names and path.endswith(tuple(names))]
    whole = {*keys_under(names, modules), *(path for path, slot in adapted.slots.items() if name in slot.adapters)}
    return [path for path in ends if path not in whole and any(True for _ in modules[path].parameters())]


def _resized(adapted: Adapted, modules: dict[str, nn.Module]) -> Iterator[str]:
    for path, shape in adapted.base_shapes.items():
        kind = kind_or_none(modules[path]) if path in modules else None
        if kind is not None and kind.shape(modules[path]) != shape:
            yield path


def _tied_to_copies(adapted: Adapted, name: str, modules: dict[str, nn.Module]) -> Iterator[str]:
    wholes = {path: whole for path, whole in adapted.whole_modules.items() if name in whole.copies}
    copies = {id(copy) for whole in wholes.values() for copy in whole.copies[name].parameters()}
    for path, module in modules.items():
        if path not in wholes and any(id(parameter) in copies for parameter in module._parameters.values()):
            yield path


def _check_slots(adapted: Adapted, name: str, modules: dict[str, nn.Module]) -> None:
    for path, slot in adapted.slots.items():
        if name not in slot.adapters:
            continue
        layer, site = modules.get(path), slot.adapters[name].site
        if layer is None or layer._modules.get(SLOT) is not slot:
            raise AttachError(
                f"{path}: the layer was replaced since its adapter was attached, so the model does not use what would "
                f"be saved; expected the layer that it was attached to: change the model first, then attach"
            )
        kind = kind_or_none(layer)
        if kind is None or kind.shape(layer) != site.shape:
            raise AttachError(
                f"{path}: the layer was resized since its adapter of {site.shape[0]} × {site.shape[1]} was attached, "
                f"so the two do not go together; expected a vocabulary that stays: resize it first, then attach"
            )


def _check_copy(whole: WholeModule, name: str, modules: dict[str, nn.Module]) -> None:
    """A module that is trained whole must hold its trained copy where that is the one in use."""
    module = modules.get(whole.path)
    if module is None or module._modules.get(WHOLE) is not whole:
        raise AttachError(
            f"{whole.path}: the module was replaced since its copy began to be trained (resizing the vocabulary does "
            f"that to an output head), so the model no longer uses what would be saved; change the model first, then "
            f"attach"
        )
    held: dict[str, torch.Tensor | None] = {**module._parameters}
    for key, copy in whole.copies[name].named_parameters():
        tensor = held.get(key)
        if whole.shown == name and tensor is not copy and (tensor is None or not torch.equal(tensor, copy)):
            raise AttachError(
                f"{whole.path}: its {key} is no longer the trained copy (as after tie_weights), so the model does not "
                f"use what would be saved; rankwise.activate(model, {name!r}) puts the copy back"
            )
