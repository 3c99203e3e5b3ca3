"""attach: gradients → start pairs → slots, in one call; and its inverse, detach."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted, base_root, check_new_name, switched_off
from rankwise.adapted.folded_start import check_foldable, fold_starts
from rankwise.adapted.whole_modules import check_copyable
from rankwise.errors import AttachError, EvidenceError, SpecError
from rankwise.evidence import input_covariances, input_directions, stored_weights
from rankwise.evidence.exact import groups_within
from rankwise.evidence.gradients import (
    AUTO_BUDGET,
    OVERSAMPLE,
    choose_method,
    exact_in_groups,
    sketch_with_warning,
)
from rankwise.inits.base import EVIDENCE, EvidenceNeed, Init
from rankwise.inits.loftq import Loftq
from rankwise.layers.kinds import KINDS, base_matrix
from rankwise.layers.quantised import forbid_repacking
from rankwise.planning import plan, whole_modules
from rankwise.sites import Site, Start, site_generator
from rankwise.spec import LoRA
from rankwise.variants.base import AdapterLayer, Variant


def attach(
    model: nn.Module,
    spec: LoRA,
    *,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    evidence: Mapping[str, Any] | None = None,
    method: str = "auto",
    memory_budget: int | None = None,
    name: str = "default",
) -> nn.Module:
    """Put a new adapter on ``model``, active and trainable, with the base frozen.

    The model's function is unchanged, but for an init that is meant to change it (``keeps_function`` False).

    Args:
        model: any module; it is changed in place (child modules and hooks on the adapted layers, nothing else).
        spec: what to adapt and how.
        batches: training batches for an init that needs to see data: dicts for ``model(**batch)`` (whose output has
            ``.loss`` where gradients are needed), or anything that ``loss(model, batch)`` takes.
        evidence: what :func:`rankwise.gradients`, ``activations``, ``covariances`` or ``weights`` returned, instead
            of ``batches``.
        method: how an init's gradients are collected, see :func:`rankwise.gradients`. With "exact", which the init may
            insist on, layers are started in groups whose gradients take ``memory_budget`` bytes (2 GiB if None), with
            a pass over the batches for each group; with "sketch" the factor has four times the rank.
        name: several named adapters may sit on one model; see :func:`activate`.

    Returns:
        The same model.

    Raises:
        TargetError, SpecError: see :func:`rankwise.plan`. AttachError: the name is taken or malformed.
        EvidenceError: the init needs batches and got none, a layer got no gradient, NaN. On any error the model is
        left exactly as it was.

    >>> import torch, rankwise as rw
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> model = rw.attach(model, rw.LoRA(rank=2))
    >>> sum(p.numel() for p in rw.trainable_parameters(model))
    88
    """
    check_new_name(model, name)
    forbid_repacking(model)
    if not isinstance(spec, LoRA):
        raise SpecError(f"spec must be a rankwise.LoRA(...) or rankwise.Bottleneck(...), found {spec!r}")
    root = base_root(model)
    planned, whole = plan(root, spec), whole_modules(root, spec.modules_to_save)
    for path, module in whole.items():
        check_copyable(path, module)
    if spec.anchor == "fold":
        check_foldable(root, planned)
    with switched_off(model):
        layers = _adapters(_Wanted(root, spec, planned, batches, loss, method, memory_budget), evidence)
    adapted = Adapted.ensure(model)
    adapted.add(name, spec, layers, dict.fromkeys(whole), trainable=True)
    if spec.anchor == "fold":
        fold_starts(adapted, layers)
    return model


@dataclass(frozen=True)
class _Wanted:
    """What a collector is asked for."""

    model: nn.Module
    spec: LoRA
    sites: Sequence[Site]
    batches: Iterable[Any] | None
    loss: Callable[[nn.Module, Any], Tensor] | None
    method: str
    memory_budget: int | None

    @property
    def init(self) -> Init:
        """The initialisation that asks."""
        assert isinstance(self.spec.init, Init)
        return self.spec.init

    def starting(self) -> list[Site]:
        """The sites with the ranks that their starts have."""
        assert isinstance(self.spec.variant, Variant)
        return [self.spec.variant.starting(site) for site in self.sites]

    def layers(self) -> dict[str, nn.Module]:
        """Site name → layer."""
        return {site.name: self.model.get_submodule(site.name) for site in self.sites}

    def data(self) -> Iterable[Any]:
        """The batches, which must be there."""
        if self.batches is None:
            raise EvidenceError(
                f"init {type(self.init).__name__} starts from the data's {self.init.needs}: pass batches=... "
                f"(a few batches of the training data), or evidence=... collected before"
            )
        return self.batches


Seen = Mapping[str, Any]  # site name → what the init needs of it


def _gradients(wanted: _Wanted) -> Iterator[Seen]:
    layers, data = wanted.layers(), wanted.data()
    if choose_method(wanted.method, layers, wanted.memory_budget, whole=wanted.init.needs_whole_gradient) == "sketch":
        widths = {site.name: OVERSAMPLE * site.rank for site in wanted.starting()}
        yield sketch_with_warning(wanted.model, layers, data, widths, wanted.loss)
    else:
        groups = groups_within(layers, AUTO_BUDGET if wanted.memory_budget is None else wanted.memory_budget)
        yield from exact_in_groups(wanted.model, groups, data, wanted.loss)


def _activations(wanted: _Wanted) -> Iterator[Seen]:
    ranks = {site.name: wanted.init.evidence_rank(site) for site in wanted.starting()}
    yield input_directions(wanted.model, wanted.layers(), wanted.data(), ranks, wanted.loss)


def _covariance(wanted: _Wanted) -> Iterator[Seen]:
    yield input_covariances(wanted.model, wanted.layers(), wanted.data(), wanted.loss)


def _weights(wanted: _Wanted) -> Iterator[Seen]:
    reference = wanted.init.reference if isinstance(wanted.init, Loftq) else None
    if reference is None:
        raise EvidenceError(
            f"init {type(wanted.init).__name__} starts from the full-precision weights: give its reference= a "
            f"safetensors file of them, or pass evidence=rankwise.weights(full_precision_model)"
        )
    yield stored_weights(reference, wanted.layers())


def _nothing(wanted: _Wanted) -> Iterator[Seen]:
    yield dict.fromkeys(site.name for site in wanted.sites)


# Each yields the evidence of all sites, or of one group of sites after the other where all at once would be too large.
_COLLECTORS: dict[EvidenceNeed, Callable[[_Wanted], Iterator[Seen]]] = {
    "nothing": _nothing,
    "gradients": _gradients,
    "activations": _activations,
    "covariance": _covariance,
    "weights": _weights,
}


def _evidence(wanted: _Wanted, given: Seen | None) -> Iterator[Seen]:
    """What was given for all sites, or what the init's collector finds."""
    if given is None or wanted.init.needs == "nothing":
        yield from _COLLECTORS[wanted.init.needs](wanted)
        return
    missing = [site.name for site in wanted.sites if site.name not in given]
    if missing:
        raise EvidenceError(f"evidence lacks {len(missing)} of {len(wanted.sites)} sites, the first is {missing[0]!r}")
    for site in wanted.sites:
        if not isinstance(given[site.name], EVIDENCE[wanted.init.needs]):
            raise EvidenceError(
                f"{site.name}: init {type(wanted.init).__name__} starts from {wanted.init.needs}, found a "
                f"{type(given[site.name]).__name__}; collect that, or pass batches"
            )
    yield given


def _with_ranks(init: Init, sites: Sequence[Site], seen: Seen) -> list[Site]:
    """The sites with the ranks that the init gives them now; one with rank 0 is left out. Scales stay as planned."""
    ranks = init.ranks(sites, seen)
    return [replace(site, rank=ranks[site.name]) for site in sites if ranks[site.name]]


def _adapters(wanted: _Wanted, given: Seen | None) -> dict[str, AdapterLayer]:
    """Site name → adapter layer: the evidence is collected, ranks are settled, each site gets its start."""
    variant = wanted.spec.variant
    assert isinstance(variant, Variant)
    built: dict[str, AdapterLayer] = {}
    for seen in _evidence(wanted, given):
        sites = {s.name: s for s in _with_ranks(wanted.init, [s for s in wanted.sites if s.name in seen], seen)}
        starting = [variant.starting(site) for site in sites.values()]
        generators = {name: site_generator(wanted.spec.seed, name) for name in sites}
        weights = {name: partial(base_matrix, wanted.model.get_submodule(name)) for name in sites}
        layers: dict[str, AdapterLayer] = {}
        with torch.no_grad():
            starts = wanted.init.starts(starting, lambda site: weights[site.name](), seen, generators)  # noqa: B023
            for site, start in starts:
                planned, weight = sites[site.name], weights[site.name]()
                layers[site.name] = _build(planned, weight, site, wanted.spec, start, generators[site.name])
        built |= {name: layers[name] for name in sites}  # in the model's order
    return built


def _build(
    planned: Site, weight: Tensor, site: Site, spec: LoRA, start: Start, generator: torch.Generator
) -> AdapterLayer:
    """The layer of a planned site; ``site`` is the one that the start was made for."""
    assert isinstance(spec.variant, Variant)
    if start.A.shape != (site.rank, site.shape[1]) or start.B.shape != (site.shape[0], site.rank):
        raise EvidenceError(
            f"{site.name}: the evidence is that of another layer: it gives B {tuple(start.B.shape)} and A "
            f"{tuple(start.A.shape)}, expected [{site.shape[0]}, {site.rank}] and [{site.rank}, {site.shape[1]}]"
        )
    start = spec.variant.adjusted(start, generator, default=spec.has_default_init)
    if not bool(start.A.any()) and not bool(start.B.any()):
        raise SpecError(
            f"{site.name}: init {type(spec.init).__name__} starts from zeros here, as the weight itself may be zero; "
            f"no gradient would ever reach A or B: exclude the module, or use init 'kaiming'"
        )
    return spec.variant.anchored(spec.anchor).build(planned, KINDS[site.kind], weight, start, spec.dropout)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take adapters off; without a name all of them. What is left is the pretrained model, bit for bit.

    Also undoes :func:`rankwise.adapted.merge`. Returns the same model.

    Raises:
        AttachError: the model carries no adapter (of that name).
    """
    adapted = Adapted.of(model)
    if not adapted.enabled:
        raise AttachError("the adapters are disabled for a moment: leave the block of rankwise.disabled(model) first")
    if name is None or set(adapted.specs) == {name}:
        adapted.restore()
    else:
        adapted.remove(adapted.adapter_name(name))
    return model


def activate(model: nn.Module, name: str | Iterable[str]) -> nn.Module:
    """Let the named adapter (or several) take part in the forward, and only it be trained.

    Several changes of a weight add up; a bottleneck acts on the output of the layer so changed, whatever the order of
    the names; several bottlenecks act one after the other in the order of the names.

    Raises:
        AttachError: no such adapter, none named, or one that cannot be combined with another (DoRA).
    """
    names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    if not names:
        raise AttachError("no adapter named; for the pretrained model alone use rankwise.disabled(model), or detach")
    adapted = Adapted.of(model)
    adapted.activate(tuple(adapted.adapter_name(name) for name in names))
    return model


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """The pretrained model for a moment, exactly, even with a non-zero start: ``with disabled(model): ...``.

    Raises:
        AttachError: the model carries no adapter, or is merged.
    """
    adapted = Adapted.of(model)
    adapted.check_unmerged()
    return adapted.switched_off()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The tensors to hand an optimizer: those of the active adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
