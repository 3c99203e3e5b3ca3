"""save and load: an adapter between a model and a PEFT directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted, base_root, check_new_name, switched_off
from rankwise.adapted.whole_modules import base_state, check_copyable
from rankwise.adapter import Adapter, SiteAdapter, base_probes, extract, probe
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import fp32_or_finer
from rankwise.errors import AttachError, BaseMismatch, MissingTensor, ShapeMismatch, UnexpectedTensor
from rankwise.files import read_json
from rankwise.format.base_layers import base_layer
from rankwise.format.configuration import is_own
from rankwise.format.names import BASE_COPY, CONFIG, TENSORS
from rankwise.format.own_form import OwnAdapter, read_own_form, write_own_form
from rankwise.format.peft import read_adapter, write_adapter
from rankwise.layers.kinds import Kind, kind_of, kind_or_none
from rankwise.layers.quantised import dequantised, forbid_repacking, is_quantised
from rankwise.methods import name_of
from rankwise.patterns import ends_of, keys_under
from rankwise.planning import whole_modules
from rankwise.sites import Site, base_modules
from rankwise.variants import VARIANTS
from rankwise.variants.base import FoldableLayer, PairVariant


def save(model: nn.Module, directory: str | Path, *, name: str | None = None) -> None:
    """Write an adapter (the active one by default) as a PEFT directory that is exact on the clean base.

    An adapter that no pair can express, such as a bottleneck, gets a directory that PEFT refuses by name and only
    :func:`load` reads. Each file is written whole and renamed into place.

    Raises:
        AttachError: no such adapter, or several are active and no name is given.
        UnsupportedAdapter: its variant gives tensors that no reader would know.
        NonFiniteTensor: it holds NaN or infinity.
    """
    adapted = Adapted.of(model)
    name = adapted.adapter_name(name)
    spec = adapted.specs[name]
    if isinstance(spec.variant, PairVariant):
        write_adapter(portable(model, name=name), directory)
        return
    layers = adapted.adapter_layers(name)
    with adapted.switched_off():
        probes = base_probes(adapted.root, list(layers))
    write_own_form(OwnAdapter(spec, layers, adapted.whole_tensors(name), probes), directory)


def portable(model: nn.Module, *, name: str | None = None) -> Adapter:
    """An adapter that changes weights (the active one by default) as a value, without the model.

    Raises:
        AttachError: no such adapter, several are active and no name is given, or it changes no weight.
    """
    adapted = Adapted.of(model)
    name = adapted.adapter_name(name)
    spec = adapted.specs[name]
    layers = adapted.adapter_layers(name)
    changes = {path: layer for path, layer in layers.items() if isinstance(layer, FoldableLayer)}
    if len(changes) < len(layers):
        raise AttachError(
            f"adapter {name!r} is of variant {name_of(VARIANTS, spec.variant)!r}, which acts behind a layer; expected "
            f"one that changes the layer's weight"
        )
    with adapted.switched_off():  # the probe must see the pretrained weights, whatever the anchor
        return extract(adapted.root, spec, changes, adapted.whole_tensors(name))


def load(
    model: nn.Module,
    directory: str | Path,
    *,
    trainable: bool = False,
    name: str = "default",
    allow_other_base: bool = False,
    modules_to_save: Sequence[str] | None = None,
) -> nn.Module:
    """Put an adapter from a PEFT directory, whoever wrote it, on ``model``, and make it the active one.

    Args:
        trainable: whether its tensors are to be trained on.
        name: what to call it here.
        allow_other_base: load although the recorded base weights differ from this model's.
        modules_to_save: the modules that the file may replace whole, by (the last parts of) their names; () for none.
            Default: those that its own configuration names, as PEFT does. ``rankwise.inspection.inspect`` lists them.

    Returns:
        The same model.

    Raises:
        CheckpointError: one of its kinds, see ``rankwise.errors``. The model is then left as it was.
        AttachError: the name is taken or malformed, or the model is merged.
    """
    check_new_name(model, name)
    if trainable:
        forbid_repacking(model)
    root = base_root(model)
    where = Path(directory) / TENSORS
    if is_own(read_json(Path(directory) / CONFIG)):
        stored = read_own_form(root, directory)
        _check_allowed(stored.whole, modules_to_save, where)
        if not allow_other_base:
            _check_base(root, stored.base_probe, None, directory, quantised=False)
        whole = _saved_whole(root, stored.spec.modules_to_save, stored.whole, where)
        Adapted.ensure(model).add(name, stored.spec, stored.layers, whole, trainable=trainable)
        return model
    adapter = read_adapter(directory)
    _check_allowed(adapter.saved, modules_to_save, where)
    _check_promised(root, adapter, where)
    variant = adapter.spec.variant
    assert isinstance(variant, PairVariant)
    modules = base_modules(root)
    built = {
        path: _restore(modules, path, site, variant, adapter.spec.dropout, directory)
        for path, site in adapter.sites.items()
    }
    if not allow_other_base:
        _check_base(root, adapter.base_probe, adapter.base_model, directory, quantised=adapter.base_quantised)
    whole = _saved_whole(root, adapter.spec.modules_to_save, adapter.saved, where)
    Adapted.ensure(model).add(name, adapter.spec, built, whole, trainable=trainable)
    return model


def _saved_whole(
    model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor], where: Path
) -> dict[str, dict[str, Tensor]]:
    """Path of a module of ``modules_to_save`` → its tensors, checked against the model's own.

    PEFT lists heads that a model may have ("classifier", "score"): a name without tensors that fits no module is none.
    """
    known = {end for path in base_modules(model) for end in ends_of(path)}
    present = [name for name in names if name in known]
    whole = whole_modules(model, present)
    by_module = {path: {k: v for k, v in tensors.items() if k.startswith(f"{path}.")} for path in whole}
    strays = tensors.keys() - {key for part in by_module.values() for key in part}
    if strays:
        raise BaseMismatch(f"{where}: has {min(strays)}, of a module that this model lacks; it is another base's")
    for path, module in whole.items():
        check_copyable(path, module)
        _check_state(where, path, base_state(path, module), by_module[path])
    return {
        path: {key.removeprefix(f"{path}."): tensor for key, tensor in part.items()} for path, part in by_module.items()
    }


def _check_state(where: Path, path: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if expected.keys() - found.keys():
        raise MissingTensor(f"{where}: no {min(expected.keys() - found.keys())}, which modules_to_save promises")
    if found.keys() - expected.keys():
        raise UnexpectedTensor(f"{where}: has {min(found.keys() - expected.keys())}, which this model's {path} lacks")
    for key, tensor in expected.items():
        if found[key].shape != tensor.shape:
            raise ShapeMismatch(
                f"{where}: {key} is {tuple(found[key].shape)}, expected {tuple(tensor.shape)}; give this model a "
                f"{path} of that size (for a classifier: the same number of labels)"
            )
        if found[key].is_floating_point() != tensor.is_floating_point():
            raise ShapeMismatch(f"{where}: {key} is {found[key].dtype}, expected {tensor.dtype} as in this model")


def _check_allowed(whole: Mapping[str, Tensor], names: Sequence[str] | None, where: Path) -> None:
    """If the caller names modules, no other is replaced."""
    strays = whole.keys() - keys_under(names, whole) if names is not None else set()
    if strays:
        raise UnexpectedTensor(
            f"{where}: has {min(strays)}, which would replace a whole tensor of the model; expected such tensors of "
            f"{', '.join(names or ()) or 'no module'} only: name its module in modules_to_save if you trust the file"
        )


def _check_promised(model: nn.Module, adapter: Adapter, where: Path) -> None:
    """Every module that the configuration targets must have its tensors."""
    targets, excluded = adapter.targets, adapter.spec.exclude_modules
    if isinstance(targets, str) or isinstance(excluded, str):
        return  # regular expressions out of a file are not run: one can be made to take forever
    layers = [path for path, module in base_modules(model).items() if kind_or_none(module) is not None]
    elsewhere = {*adapter.sites, *keys_under(adapter.spec.modules_to_save, layers)}
    wanted, unwanted = set(targets), set(excluded)
    for path in layers:
        ends = ends_of(path)
        if path not in elsewhere and unwanted.isdisjoint(ends) and not wanted.isdisjoint(ends):
            raise MissingTensor(f"{where}: no tensors for {path}, which target_modules names; the file is incomplete")


def _restore(
    modules: Mapping[str, nn.Module],
    path: str,
    site: SiteAdapter,
    variant: PairVariant,
    dropout: float,
    directory: str | Path,
) -> FoldableLayer:
    layer = base_layer(modules, path, directory)
    kind = kind_of(layer)
    _check_fits(layer, kind, path, site, directory)
    extra = dict(site.extra)
    _check_base_copy(layer, path, extra.pop(BASE_COPY, None), directory)
    delta = site.delta
    weight = dequantised(layer) if is_quantised(layer) else kind.weight(layer)
    device, dtype = weight.device, fp32_or_finer(weight.dtype)
    moved = LowRank(delta.B.to(device, dtype), delta.A.to(device, dtype), delta.scale)
    described = Site(path, kind.name, kind.shape(layer), moved.rank, moved.scale)
    restored = variant.restore(described, kind, weight, moved, extra)
    restored.dropout = dropout  # of use only where it is trained on
    return restored


def _check_base_copy(layer: Any, path: str, copy: Tensor | None, directory: str | Path) -> None:
    """A base weight in the file (PEFT puts an adapted embedding's there) must be this model's own."""
    if copy is None:
        return
    own = layer.weight.detach()
    if copy.shape != own.shape or not torch.allclose(copy.to(own), own, rtol=1e-2, atol=1e-6):
        raise BaseMismatch(
            f"{directory}: holds a whole weight for {path} ({tuple(copy.shape)}) that is not this model's "
            f"{tuple(own.shape)} one, so the base was resized or trained; load that base first"
        )


def _check_fits(layer: Any, kind: Kind, path: str, site: SiteAdapter, directory: str | Path) -> None:
    alike = kind.name == site.kind or (kind.name == "conv1d" and site.kind == "linear")
    out, into = kind.shape(layer)
    kernel = kind.kernel(layer)
    fits = alike and site.groups == kind.groups(layer) and site.delta.shape == (out, into) and site.kernel == kernel
    if not fits:
        raise ShapeMismatch(
            f"{directory}: {path} is a {site.kind} of {site.delta.B.shape[0]} × "
            f"{site.kernel or site.delta.A.shape[1]} in the file and a {kind.name} of {out} × {kernel or into} in this "
            f"model; it was written for another base"
        )


def _check_base(
    model: nn.Module,
    probes: Mapping[str, tuple[float, ...]],
    base_model: str | None,
    directory: str | Path,
    *,
    quantised: bool,
) -> None:
    """Compare the recorded probe of the base with this model's weights, with room for rounding to bf16 or 4 bits.

    Args:
        quantised: whether the recorded base was.
    """
    modules = base_modules(model)
    strays = [path for path in probes if path not in modules or kind_or_none(modules[path]) is None]
    if strays:
        raise BaseMismatch(f"{directory}: records base weights of {strays[0]!r}, no layer of this model that could be")
    with switched_off(model):
        for path, recorded in probes.items():
            layer: Any = model.get_submodule(path)
            there, here = torch.tensor(recorded), torch.tensor(probe(layer))
            # 4 bits move some small layers' few numbers by a third; another base's are off by about 1.4.
            room = 0.5 if quantised or is_quantised(layer) else 0.02
            gap = float((there - here).norm() / there.norm().clamp_min(1e-30))
            if gap > room:
                raise BaseMismatch(
                    f"{directory}: the base weights at {path} differ by {gap:.0%} from those that the adapter was "
                    f"trained on (expected ≤ {room:.0%}); load its own base{f' {base_model}' if base_model else ''}, "
                    f"or pass allow_other_base=True"
                )
