"""save and load: an adapter between a model and a PEFT directory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted, base_root, check_new_name, switched_off
from rankwise.adapted.whole_modules import StartingValues, base_state, base_tensors, check_copyable
from rankwise.adapter import Adapter, SiteAdapter, base_probes, extract, probe, unlike_peft
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import fp32_or_finer
from rankwise.base_probe import gap, room
from rankwise.errors import (
    AttachError,
    BaseMismatch,
    MissingTensor,
    ShapeMismatch,
    TargetError,
    UnexpectedTensor,
    UnsupportedAdapter,
)
from rankwise.files import read_json, settled
from rankwise.format.built import BuiltAdapter, base_layer
from rankwise.format.configuration import is_own, relative_start, stated_fields
from rankwise.format.in_use import changed_layers, named_along
from rankwise.format.names import CONFIG, FILES, TENSORS, TOKEN_ROWS, is_token_rows
from rankwise.format.own_form import read_own_form, write_own_form
from rankwise.format.peft import read_pairs, write_adapter
from rankwise.format.relative import change_of_base, check_untied
from rankwise.format.renamed import with_present_names
from rankwise.format.save_pretrained import save_as_adapter
from rankwise.format.selection import Selection, stated_selection
from rankwise.format.vocabulary import changed_embeddings
from rankwise.layers.kinds import Kind, kind_of, kind_or_none
from rankwise.layers.quantised import forbid_repacking, is_quantised
from rankwise.methods import name_of
from rankwise.patterns import ends_of, keys_under
from rankwise.placement import check_differentiable, check_in_memory, holding, is_sharded, whole_tensor
from rankwise.planning import target_layers, whole_modules
from rankwise.sites import SLOT, WHOLE, Site, base_modules
from rankwise.spec import LoRA
from rankwise.tensor_files import check_fit
from rankwise.token_rows import TiedRows, TokenRows, beside_layers
from rankwise.trained_beside import TrainedBeside, trained_biases, trained_tokens
from rankwise.variants import VARIANTS
from rankwise.variants.base import AdapterLayer, FoldableLayer, PairVariant


def save(model: nn.Module, directory: str | Path, *, name: str | None = None) -> None:
    """Write an adapter (the active one by default) as a PEFT directory that is exact on the clean base.

    An adapter that no pair can express, such as a bottleneck, gets a directory that PEFT refuses by name and only
    :func:`load` reads. Where an adapter lies there already, it is replaced as a whole: whatever stops this leaves the
    old one, the new one, or one without ``adapter_config.json``, which no engine takes for an adapter and which the
    next :func:`load` makes the new one.

    Of a model that FSDP2 has sharded every process calls this, the adapter is gathered, and process 0 writes it whole.

    Raises:
        AttachError: no such adapter, several are active and no name is given, the model is offloaded, or it was changed
            under it, so that it does not use what would be saved.
        UnsupportedAdapter: its variant gives tensors that no reader would know.
        NonFiniteTensor: it holds NaN or infinity.
        WriteError: the system refuses.
    """
    adapted = Adapted.of(model)
    check_in_memory(adapted.root)
    name = adapted.adapter_name(name)
    shards = {key: shard for key, shard in _parameters(adapted, name) if is_sharded(shard)}
    with holding(adapted.root, {key: whole_tensor(shard.detach()) for key, shard in shards.items()}):
        _save(adapted, name, Path(directory), writes=not shards or dist.get_rank() == 0)


def _parameters(adapted: Adapted, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of an adapter and of the modules that it trains whole, by their names in the model."""
    parts: dict[str, nn.Module] = {
        **{f"{path}.{SLOT}.adapters": layer for path, layer in adapted.adapter_layers(name).items()},
        **{f"{path}.{WHOLE}.copies": w.copies[name] for path, w in adapted.whole_modules.items() if name in w.copies},
    }
    for path, part in parts.items():
        yield from part.named_parameters(f"{path}.{name}", remove_duplicate=False)


def _save(adapted: Adapted, name: str, directory: Path, *, writes: bool) -> None:
    if isinstance(adapted.specs[name].variant, PairVariant):
        adapter = portable(adapted.root, name=name)
        if writes:
            write_adapter(adapter, directory)
        return
    layers = adapted.adapter_layers(name)
    spec, whole = _saved_whole(adapted, name, layers)
    with adapted.switched_off():
        probes = base_probes(adapted.root, list(layers))
    if writes:
        write_own_form(adapted.root, BuiltAdapter(spec, layers, whole, probes), directory)


def _saved_whole(adapted: Adapted, name: str, layers: Mapping[str, AdapterLayer]) -> tuple[LoRA, dict[str, Tensor]]:
    """The spec of what is saved, and the tensors that are saved whole.

    Those are the ones trained so, rows of an embedding too, a resized vocabulary's, a head's that was tied to a trained
    one, and those that PEFT would look for because of their names.

    Raises:
        AttachError: the model was changed, so that it does not use what would be saved.
    """
    spec = adapted.specs[name]
    added = dict.fromkeys([*changed_layers(adapted, name), *named_along(adapted, name)])
    whole = adapted.whole_tensors(name)
    whole |= {f"{path}.{TOKEN_ROWS}": layer.rows for path, layer in layers.items() if isinstance(layer, TokenRows)}
    for path in added:
        whole |= base_state(path, adapted.layer(path))
    tensors = {key: whole_tensor(tensor) for key, tensor in whole.items()}
    return replace(spec, modules_to_save=(*spec.modules_to_save, *added)), tensors


def portable(model: nn.Module, *, name: str | None = None) -> Adapter:
    """An adapter that changes weights (the active one by default) as a value, without the model.

    Raises:
        AttachError: no such adapter, several are active and no name is given, it changes no weight, or the model is
            offloaded.
    """
    adapted = Adapted.of(model)
    check_in_memory(adapted.root)
    name = adapted.adapter_name(name)
    layers = adapted.adapter_layers(name)
    changes = {path: layer for path, layer in layers.items() if isinstance(layer, FoldableLayer)}
    if not all(isinstance(layer, FoldableLayer | TokenRows | TiedRows) for layer in layers.values()):
        raise AttachError(
            f"adapter {name!r} is of variant {name_of(VARIANTS, adapted.specs[name].variant)!r}, which acts behind a "
            f"layer; expected one that changes the layer's weight"
        )
    spec, whole = _saved_whole(adapted, name, layers)
    with adapted.switched_off():  # the probe must see the pretrained weights, whatever the anchor
        return extract(adapted.root, spec, changes, whole)


@torch.inference_mode(False)  # or what is made here could never be trained
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
        AttachError: the name is taken or malformed, or the model is merged or offloaded.
    """
    check_new_name(model, name)
    if trainable:
        forbid_repacking(model)
        check_differentiable(model)
    root, folder = base_root(model), Path(directory)
    adapter = settled(folder, FILES, lambda: _read(root, folder))
    _check_allowed(adapter.whole, modules_to_save, folder / TENSORS)
    if not allow_other_base:
        _check_base(root, adapter, folder)
    whole = _whole_values(root, adapter, folder / TENSORS)
    with switched_off(model):
        apart = _apart(root, whole)
    Adapted.ensure(model).add(name, adapter.spec, adapter.layers, whole, apart, trainable=trainable)
    save_as_adapter(model, save)
    return model


def _read(model: nn.Module, folder: Path) -> BuiltAdapter:
    """The adapter in a directory of either form."""
    config = read_json(folder / CONFIG)
    if is_own(config):
        return read_own_form(model, folder)
    with switched_off(model):  # what a pair is relative to are the pretrained weights
        return _built(model, read_pairs(folder, config), config, folder)


def _built(model: nn.Module, adapter: Adapter, config: Mapping[str, Any], folder: Path) -> BuiltAdapter:
    """The adapter's layers, made for ``model``."""
    adapter = with_present_names(model, adapter, folder / TENSORS)
    selection = stated_selection(folder / CONFIG, config, stated_fields(folder / CONFIG, config))
    _check_selected(model, adapter, selection, folder / TENSORS)
    biases = _biases(model, adapter, folder / TENSORS)
    rows = _rows(model, adapter, folder / TENSORS)
    replaced = changed_embeddings(model, adapter, biases, folder / TENSORS)
    modules, start = base_modules(model), relative_start(config)
    if start is not None:
        check_untied(start, model, [path for path in adapter.sites if f"{path}.weight" not in replaced])
    layers = {
        path: _restored(modules, path, site, adapter.spec, start, replaced.get(f"{path}.weight"), folder)
        for path, site in adapter.sites.items()
    }
    if not adapter.base_probe:  # another library wrote it
        _check_convolutions(modules, layers, folder)
    trained = adapter.spec.modules_to_save
    whole = {name: adapter.saved[name] for name in [*keys_under(trained, adapter.saved), *biases]} | replaced
    beside = {path for name in replaced if (path := name.rpartition(".")[0]) not in layers}
    spec = replace(adapter.spec, modules_to_save=(*trained, *sorted(beside)))
    probe, base, quantised = adapter.base_probe, adapter.base_model, adapter.base_quantised
    return BuiltAdapter(spec, layers | rows, whole, probe, base, quantised)


def _rows(model: nn.Module, adapter: Adapter, source: Path) -> dict[str, AdapterLayer]:
    """The layers for embeddings whose rows the file has.

    Raises:
        BaseMismatch: this model has no such embedding, or too few rows. MissingTensor, UnexpectedTensor,
            ShapeMismatch: the file's are not those that its configuration names.
    """
    try:
        tokens, tied = trained_tokens(model, adapter.spec.trainable_token_indices)
    except TargetError as error:
        raise BaseMismatch(f"{source}: {error}") from None
    stored = {key.removesuffix(f".{TOKEN_ROWS}"): rows for key, rows in adapter.saved.items() if is_token_rows(key)}
    stored = {path: rows for path, rows in stored.items() if path not in tied}  # PEFT may have saved those along
    widths = {path: model.get_submodule(path).get_parameter("weight").shape[1] for path in tokens}
    expected = {path: torch.empty(len(ids), widths[path], device="meta") for path, ids in tokens.items()}
    check_fit(source, stored, expected, "trainable_token_indices", "the file is incomplete, or another base's")
    return beside_layers(model, TrainedBeside((), tokens, tied), stored)


def _apart(model: nn.Module, whole: StartingValues) -> set[int]:
    """Ids of the model's tied tensors that the file has different values for: PEFT trains a copy for each module."""
    state = base_state("", model)
    given = [(id(state[name]), value) for name, value in whole.items() if value is not None]
    first = dict(reversed(given))
    return {tensor for tensor, value in given if not torch.equal(first[tensor], value)}


def _biases(model: nn.Module, adapter: Adapter, source: Path) -> list[str]:
    """Names in the model of the biases that the adapter trained.

    Raises:
        MissingTensor: the file lacks one.
    """
    names = trained_biases(model, adapter.spec.bias, adapter.sites)
    missing = [name for name in names if name not in adapter.saved]
    if missing:
        raise MissingTensor(
            f"{source}: lacks {missing[0]} ({len(missing)} in all), which bias {adapter.spec.bias!r} asks for in this "
            f"model; the file is incomplete, or another base's"
        )
    return names


def _whole_values(model: nn.Module, adapter: BuiltAdapter, source: Path) -> dict[str, Tensor | None]:
    """Name → tensor, of what is trained whole, checked against the model's own; None where the file need not have it.

    PEFT lists heads that a model may have ("classifier", "score"): a name without tensors that fits no module is none.
    """
    known = {end for path in base_modules(model) for end in ends_of(path)}
    adapted = [path for path in adapter.layers if f"{path}.weight" in adapter.whole]  # with another weight of its own
    modules = whole_modules(model, [*adapted, *(name for name in adapter.spec.modules_to_save if name in known)])
    biases = trained_biases(model, adapter.spec.bias, adapter.layers)
    expected: dict[str, Tensor] = {name: model.get_parameter(name) for name in biases}
    values: dict[str, Tensor | None] = {}
    for path, module in modules.items():
        check_copyable(path, module)
        expected |= base_state(path, module)
        values |= dict.fromkeys(base_tensors(path, module))
    strays = {name for name in adapter.whole if name not in expected and not _is_inside(name, modules)}
    if strays:
        raise BaseMismatch(f"{source}: has {min(strays)}, of a module that this model lacks; it is another base's")
    hint = (
        "give it modules_to_save as they were trained: a classifier with the same number of labels, an embedding with "
        "the same vocabulary (model.resize_token_embeddings)"
    )
    check_fit(source, adapter.whole, expected, "this model", hint)
    return {**values, **adapter.whole}


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in modules)


def _check_allowed(whole: Mapping[str, Tensor], names: Sequence[str] | None, source: Path) -> None:
    """If the caller names modules, no other is replaced."""
    strays = whole.keys() - keys_under(names, whole) if names is not None else set()
    if strays:
        raise UnexpectedTensor(
            f"{source}: has {min(strays)}, which would replace a whole tensor of the model; expected such tensors of "
            f"{', '.join(names or ()) or 'no module'} only: name its module in modules_to_save if you trust the file"
        )


def _check_selected(model: nn.Module, adapter: Adapter, selection: Selection, source: Path) -> None:
    """Every module that the configuration selects must have its tensors, and no other may."""
    if selection.targets == "all-linear":
        strays = adapter.sites.keys() - target_layers(model, "all-linear").keys()
        if strays:
            raise UnexpectedTensor(
                f"{source}: has tensors for {min(strays)}, which target_modules 'all-linear' does not select in this "
                f"model, so PEFT would leave them aside; name the module in target_modules, or take the tensors out"
            )
        return
    layers = [path for path, module in base_modules(model).items() if kind_or_none(module) is not None]
    missing = selection.chosen(layers) - adapter.sites.keys()
    if missing:
        raise MissingTensor(
            f"{source}: no tensors for {min(missing)}, which target_modules names; the file is incomplete"
        )


def _restored(
    modules: Mapping[str, nn.Module],
    path: str,
    site: SiteAdapter,
    spec: LoRA,
    start: str | None,
    replaced: Tensor | None,
    folder: Path,
) -> FoldableLayer:
    """The layer of one site.

    Args:
        start: what PEFT took off the base before the pair was trained.
        replaced: a weight that takes the place of the layer's own; the pair is then relative to that.
    """
    assert isinstance(spec.variant, PairVariant)
    layer = base_layer(modules, path, folder)
    kind = kind_of(layer)
    _check_fits(layer, kind, path, site, folder)
    delta = site.delta
    weight = kind.weight(layer) if replaced is None else kind.matrix(layer, replaced.to(layer.weight))
    device, dtype = weight.device, fp32_or_finer(weight.dtype)
    moved = LowRank(delta.B.to(device, dtype), delta.A.to(device, dtype), delta.scale)
    if start is not None and replaced is None:
        moved = change_of_base(start, path, layer, kind, moved)
    described = Site(path, kind.name, kind.shape(layer), moved.rank, moved.scale)
    restored = spec.variant.restore(described, kind, weight, moved, site.extra)
    restored.dropout = spec.dropout  # of use only where it is trained on
    return restored


def _check_convolutions(modules: Mapping[str, nn.Module], paths: Iterable[str], folder: Path) -> None:
    """PEFT trained its own layer in place of a convolution's change, and that one may be no change of the weight."""
    for path in paths:
        if left_out := unlike_peft(modules[path]):
            raise UnsupportedAdapter(
                f"{folder}: {path} is a convolution with {left_out}, which PEFT's layer for it lacks: what it computes "
                "is no change of the weight, and no file without rankwise.json is read for it; train it anew here"
            )


def _check_fits(layer: Any, kind: Kind, path: str, site: SiteAdapter, folder: Path) -> None:
    alike = kind.name == site.kind or (kind.name == "conv1d" and site.kind == "linear")
    (out, into), kernel = kind.shape(layer), kind.kernel(layer)
    stored = site.delta.shape, site.kernel, site.groups
    if not alike or stored != ((out, into), kernel, kind.groups(layer)):
        raise ShapeMismatch(
            f"{folder}: {path} is a {site.kind} of {site.delta.B.shape[0]} × {site.kernel or site.delta.A.shape[1]} "
            f"in the file and a {kind.name} of {out} × {kernel or into} in this model; it was written for another base"
        )


def _check_base(model: nn.Module, adapter: BuiltAdapter, folder: Path) -> None:
    """Compare the recorded probe of the base with this model's weights."""
    modules, probes = base_modules(model), adapter.base_probe
    strays = [path for path in probes if path not in modules or kind_or_none(modules[path]) is None]
    if strays:
        raise BaseMismatch(f"{folder}: records base weights of {strays[0]!r}, no layer of this model that could be")
    with switched_off(model):
        for path, recorded in probes.items():
            layer: Any = modules[path]
            off, allowed = gap(recorded, probe(layer)), room(adapter.base_quantised or is_quantised(layer))
            if off > allowed:
                base = f" {adapter.base_model}" if adapter.base_model else ""
                raise BaseMismatch(
                    f"{folder}: the base weights at {path} differ by {off:.0%} from those that the adapter was "
                    f"trained on (expected ≤ {allowed:.0%}); load its own base{base}, or pass allow_other_base=True"
                )
