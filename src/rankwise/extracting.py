"""extract: the LoRA that is nearest to what fine-tuning changed, from two checkpoints."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapter import Adapter, SiteAdapter, spread_evenly, targets_among, task_type, unlike_peft
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.approximation import Approximation, Fit, approximation, check_limits, fitted, norm
from rankwise.base_weights import Names, Source, name_of_source, probed, shape_of, tensors_of, transposed_weights
from rankwise.errors import BaseMismatch, NonFiniteTensor, SpecError
from rankwise.layers.kinds import CONV1D, CONV2D, EMBEDDING, LINEAR, Kind, kind_or_none
from rankwise.patterns import keys_under
from rankwise.sites import base_modules, site_generator
from rankwise.spec import LoRA

_EMBEDDINGS = ("embed_tokens", "word_embeddings", "position_embeddings", "token_type_embeddings", "wte", "wpe")


def extract(
    fine_tuned: Source,
    base: Source,
    rank: int | None = None,
    error: float | None = None,
    *,
    layout: nn.Module | None = None,
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
) -> Approximation:
    """The nearest LoRA of a rank, or within an error, to ``fine_tuned − base``, and what no LoRA holds.

    The change of each weight is decomposed by itself, shard after shard: two tensors of one name are in memory at a
    time. Large matrices are decomposed by randomised subspace iteration (Halko 2011, arXiv 0909.4061), and the error
    that is stated is measured on the change itself. Norms, biases and whatever else changed are named with the sizes
    of their changes, and count as lost.

    Args:
        fine_tuned, base: models, tensors by name, or safetensors files or directories.
        rank: of every site, where fewer ranks do not hold its change whole.
        error: or the largest error of each site, each with as few ranks as it takes.
        layout: a model that says which layers each weight is of; it may have been built on the meta device. Default:
            ``base``, where that is a model. Without one, a matrix is taken for a linear layer's unless its name says
            that it is an embedding's, and it is not known which embedding is an output head as well.
        modules_to_save: modules to be taken whole instead, by (the last parts of) their names: norms, for example.
        seed: of the randomised decompositions.

    Returns:
        The adapter, at each site ‖change − ΔW‖/‖change‖, and ``left_out``.

    Raises:
        SpecError: not exactly one of rank and error, or no layer's weight differs.
        BaseMismatch: the two have no tensor in common.
        NonFiniteTensor: a change is NaN or infinite. BrokenFile, UnsafeFile, UnexpectedTensor: of a file.

    >>> import torch
    >>> base = {"proj.weight": torch.zeros(3, 2), "norm.weight": torch.ones(3)}
    >>> tuned = {"proj.weight": torch.ones(3, 2), "norm.weight": torch.tensor([1.0, 1.0, 2.0])}
    >>> extracted = extract(tuned, base, rank=1)
    >>> list(extracted.adapter.sites), dict(extracted.left_out), round(extracted.errors["proj"], 6)
    (['proj'], {'norm.weight': 1.0}, 0.0)
    """
    check_limits("extract", rank, error)
    if rank is None and error is None:
        raise SpecError("extract: expected a rank or an error, found neither")
    after, before = tensors_of(fine_tuned), tensors_of(base)
    model = base if layout is None and isinstance(base, nn.Module) else layout
    layers = _layers_by_name(before) if model is None else _layers_by_model(model)
    known, whole = Names(layers), keys_under(modules_to_save, after)
    parts: dict[str, _Part] = {}
    left_out: dict[str, float] = {}
    for name, change, weight in _changes(after, before, set(whole)):
        places = layers.get(known.like(name) or "", ())
        if weight is None or not places:
            left_out[name] = norm(change.reshape(len(change), -1) if change.dim() else change.view(1, 1))
            continue
        for layer in places:
            if layer.path not in parts:  # a tied weight may stand there under both of its names
                fit = fitted(layer.kind.matrix(None, change), site_generator(seed, layer.path), rank, error)
                parts[layer.path] = _Part(layer, fit, probed(weight))
    if not parts:
        raise SpecError("extract: no weight of a layer differs; expected a model and one that was fine-tuned from it")
    order = dict.fromkeys(layer.path for places in layers.values() for layer in places)  # whatever the shards' is
    parts = {path: parts[path] for path in order if path in parts}
    paths = base_modules(model) if model is not None else {name.rpartition(".")[0] for name in before}
    adapter = _adapter(parts, paths, {name: after[name].clone() for name in whole}, modules_to_save)
    task = task_type(model, whole) if model is not None else None
    adapter = replace(adapter, base_model=name_of_source(base), task_type=task)
    return approximation(adapter, {path: part.fit for path, part in parts.items()}, left_out)


@dataclass(frozen=True)
class _Layer:
    """A layer that a stored weight is of."""

    path: str
    kind: Kind
    kernel: tuple[int, ...] = ()
    groups: int = 1
    unlike_peft: str = ""

    def site(self, delta: LowRank) -> SiteAdapter:
        """The layer's part of an adapter."""
        return SiteAdapter(self.kind.name, delta, self.kernel, self.groups, {}, self.unlike_peft)


@dataclass(frozen=True, eq=False)
class _Part:
    """A layer, what was fitted to its change, and the probe of its base weight."""

    layer: _Layer
    fit: Fit
    probe: tuple[float, ...]


def _layers_by_model(model: nn.Module) -> dict[str, list[_Layer]]:
    """Name of each layer's weight → all layers that have it."""
    owners: dict[int, list[_Layer]] = {}
    names: dict[str, int] = {}
    for path, module in base_modules(model).items():
        kind = kind_or_none(module)
        if kind is not None:
            layer: Any = module
            names[f"{path}.weight"] = id(layer.weight)
            described = _Layer(path, kind, kind.kernel(layer), kind.groups(layer), unlike_peft(layer))
            owners.setdefault(id(layer.weight), []).append(described)
    return {name: owners[owner] for name, owner in names.items()}


def _layers_by_name(tensors: Mapping[str, Tensor]) -> dict[str, list[_Layer]]:
    """The same, as far as names and shapes tell."""
    layers: dict[str, list[_Layer]] = {}
    transposed = transposed_weights(tensors)
    for name in tensors:
        path, _, last = name.rpartition(".")
        axes = len(shape_of(tensors, name)) if last == "weight" and path else 0
        if axes == 2:
            linear = CONV1D if name in transposed else LINEAR
            layers[name] = [_Layer(path, EMBEDDING if path.rpartition(".")[2] in _EMBEDDINGS else linear)]
        elif axes == 4:
            layers[name] = [_Layer(path, CONV2D, shape_of(tensors, name)[1:])]
    return layers


def _changes(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor], whole: set[str]
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, change in fp32 or finer, and the base's tensor, of all that differ.

    Of a tensor that only one of the two has, or in another shape, the base's is None, and the change is as much as can
    be said: new rows count whole.

    Raises:
        BaseMismatch: none has a counterpart. NonFiniteTensor: a change is not finite.
    """
    names = Names(before)
    counterparts = {name: names.like(name) for name in after}
    if not any(counterparts.values()):
        raise BaseMismatch(
            f"extract: the checkpoints have no tensor in common ({min(after, default='none')} and "
            f"{min(before, default='none')}); expected a model and one that was fine-tuned from it"
        )
    for name, old_name in counterparts.items():
        if name in whole:
            continue
        new, old = after[name], before[old_name] if old_name else None
        if old is not None and new.shape == old.shape:
            change = at_least_fp32(new) - at_least_fp32(old)
        else:
            change, old = _resized(new, old), None
        if not torch.isfinite(change).all():
            raise NonFiniteTensor(f"extract: the change of {name} holds NaN or infinity; expected finite weights")
        if change.any():
            yield name, change, old
    for old_name in sorted(before.keys() - set(counterparts.values())):
        yield old_name, at_least_fp32(before[old_name]), None


def _resized(new: Tensor, old: Tensor | None) -> Tensor:
    change = at_least_fp32(new).clone()
    if old is not None and new.shape[1:] == old.shape[1:]:
        shared = min(len(new), len(old))
        change[:shared] -= at_least_fp32(old[:shared])
    return change


def _adapter(
    parts: Mapping[str, _Part], paths: Iterable[str], saved: Mapping[str, Tensor], modules_to_save: Sequence[str]
) -> Adapter:
    targets = targets_among(paths, list(parts))
    rank = max(part.fit.delta.rank for part in parts.values())
    return Adapter(
        LoRA(rank=rank, alpha=rank, target_modules=targets, modules_to_save=modules_to_save),
        {path: part.layer.site(part.fit.delta) for path, part in parts.items()},
        targets,
        {path: parts[path].probe for path in spread_evenly(list(parts))},
        saved=saved,
    )
