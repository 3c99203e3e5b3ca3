"""attach: gradients → start pairs → slots, in one call; and its inverse, detach."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted, base_root, check_new_name, switched_off
from rankwise.adapted.folded_start import check_foldable, fold_starts
from rankwise.adapted.whole_modules import base_tensors, check_copyable
from rankwise.collection import given_evidence
from rankwise.errors import AttachError, EvidenceError, SpecError
from rankwise.evidence.backward import note_idle
from rankwise.evidence.collecting import collect
from rankwise.evidence.undisturbed import repeatable
from rankwise.format.save_load import save
from rankwise.format.save_pretrained import save_as_adapter
from rankwise.inits.base import Init
from rankwise.layers.kinds import KINDS, base_matrix
from rankwise.layers.quantised import forbid_repacking
from rankwise.placement import check_differentiable
from rankwise.planning import Plan, plan, planned, planned_sites, starting_sites, whole_modules
from rankwise.sites import Site, Start, site_generator, variant_generator
from rankwise.spec import LoRA
from rankwise.token_rows import beside_layers
from rankwise.variants.base import AdapterLayer, Variant

log = logging.getLogger("rankwise")


@overload
def attach(model: nn.Module, spec: LoRA, *, dry_run: Literal[True], **rest: Any) -> Plan: ...
@overload
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
    dry_run: Literal[False] = False,
) -> nn.Module: ...
def attach(  # type: ignore[misc]  # a dry run takes what attach takes
    model: nn.Module,
    spec: LoRA,
    *,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    evidence: Mapping[str, Any] | None = None,
    method: str = "auto",
    memory_budget: int | None = None,
    name: str = "default",
    dry_run: bool = False,
) -> nn.Module | Plan:
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
        dry_run: check everything and return the plan, its sites and passes, with no batch read and nothing changed.

    Returns:
        The same model; of a dry run the :class:`rankwise.planning.Plan`.

    Raises:
        TargetError, SpecError: see :func:`rankwise.plan`. AttachError: the name is taken or malformed, or the model's
        tensors are not in memory (offloaded, or on the meta device; a plan needs none).
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
    check_differentiable(model)
    if not isinstance(spec, LoRA):
        raise SpecError(f"spec must be a rankwise.LoRA(...) or rankwise.Bottleneck(...), found {spec!r}")
    assert isinstance(spec.init, Init)
    if spec.init.needs == "nothing":
        evidence = None
    root = base_root(model)
    chosen = _plan(root, spec, method, memory_budget, evidence)
    whole = whole_modules(root, spec.modules_to_save)
    for path, module in whole.items():
        check_copyable(path, module)
    if spec.anchor == "fold":
        check_foldable(root, chosen)
    if dry_run:
        return chosen
    for note in chosen.left_out:
        log.warning("left out of all-linear: %s", note)
    with torch.inference_mode(False):  # or what is made here could never be trained
        with switched_off(model):
            layers = _adapters(root, spec, chosen, evidence, batches, loss)
            rows = beside_layers(root, chosen.beside)
        tensors = [tensor for path, module in whole.items() for tensor in base_tensors(path, module)]
        adapted = Adapted.ensure(model)
        adapted.add(name, spec, layers | rows, dict.fromkeys([*tensors, *chosen.beside.biases]), trainable=True)
        save_as_adapter(model, save)
        if spec.anchor == "fold":
            fold_starts(adapted, layers)
    return model


def _plan(
    model: nn.Module, spec: LoRA, method: str, memory_budget: int | None, given: Mapping[str, Any] | None
) -> Plan:
    """The plan, in which nothing is collected where evidence was given."""
    assert isinstance(spec.init, Init) and isinstance(spec.variant, Variant)
    if given is None:
        return plan(model, spec, method=method, memory_budget=memory_budget)
    sites = planned_sites(model, spec)
    return planned(model, spec, sites, given_evidence(starting_sites(sites, spec), spec.init, given))


def _adapters(
    model: nn.Module,
    spec: LoRA,
    chosen: Plan,
    given: Mapping[str, Any] | None,
    batches: Iterable[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> dict[str, AdapterLayer]:
    """Site name → adapter layer, one pass's evidence after the other, so that no two are held at a time."""
    sites = {site.name: site for site in chosen}
    batches = None if batches is None else repeatable(batches, len(chosen.evidence.passes))
    adapters: dict[str, AdapterLayer] = {}
    idle: list[str] | None = [] if spec.target_modules == "all-linear" else None  # what was named must be there
    for part in chosen.evidence.passes:
        group = [sites[site.name] for site in part.sites]
        if given is None:
            adapters |= _started(model, spec, group, collect(model, chosen.evidence, part, batches, loss, idle=idle))
        else:
            adapters |= _started(model, spec, group, given)
    for name in idle or ():
        if not adapters:
            note_idle(name, None)
        log.warning("left out of all-linear: %s, which no gradient reached in the batches given", name)
    return adapters


@torch.no_grad()
def _started(
    model: nn.Module, spec: LoRA, sites: Sequence[Site], evidence: Mapping[str, Any]
) -> dict[str, AdapterLayer]:
    """Site name → adapter layer: ranks are settled, each site gets its start."""
    assert isinstance(spec.init, Init)
    sites = [site for site in sites if site.name in evidence]
    ranks = spec.init.ranks(sites, evidence)  # scales stay as planned; a site left with rank 0 carries no adapter
    settled = {site.name: replace(site, rank=ranks[site.name]) for site in sites if ranks[site.name]}
    generators = {name: site_generator(spec.seed, name) for name in settled}

    def weight_of(site: Site) -> Tensor:
        return base_matrix(model.get_submodule(site.name))

    adapters = {
        site.name: _build(settled[site.name], weight_of(site), site, spec, start)
        for site, start in spec.init.starts(starting_sites(settled.values(), spec), weight_of, evidence, generators)
    }
    return {name: adapters[name] for name in settled}  # in the model's order


def _build(planned: Site, weight: Tensor, site: Site, spec: LoRA, start: Start) -> AdapterLayer:
    """The layer of a planned site; ``site`` is the one that the start was made for."""
    assert isinstance(spec.variant, Variant)
    if start.A.shape != (site.rank, site.shape[1]) or start.B.shape != (site.shape[0], site.rank):
        raise EvidenceError(
            f"{site.name}: the evidence is that of another layer: it gives B {tuple(start.B.shape)} and A "
            f"{tuple(start.A.shape)}, expected [{site.shape[0]}, {site.rank}] and [{site.rank}, {site.shape[1]}]"
        )
    start = spec.variant.adjusted(start, variant_generator(spec.seed, site.name), default=spec.has_default_init)
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
