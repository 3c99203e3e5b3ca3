"""combine: one adapter out of several, and how far it is from what the method says."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rankwise.adapter import Adapter, SiteAdapter
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.approximation import Approximation, Change, Fit, approximation, check_limits, fitted
from rankwise.base_probe import gap, room
from rankwise.base_weights import BaseWeights, Source
from rankwise.combinations import COMBINATIONS
from rankwise.combinations.base import Combination
from rankwise.errors import BaseMismatch, ShapeMismatch, SpecError, UnsupportedAdapter
from rankwise.layers.kinds import KINDS
from rankwise.methods import name_of, resolve
from rankwise.sites import Site, site_generator
from rankwise.spec import LoRA
from rankwise.variants.base import PairVariant


def combine(
    parts: Sequence[tuple[Adapter, float]],
    method: str | Mapping[str, Any] | Combination = "exact",
    rank: int | None = None,
    error: float | None = None,
    *,
    base: Source | None = None,
    seed: int = 0,
) -> Approximation:
    """One plain LoRA adapter out of several adapters and their weights.

    At each site the method makes one change out of the weighted changes wᵢΔWᵢ, site after site; of what it makes, the
    nearest pair of a rank is kept. Adapters need not have the same sites, ranks, scales or variants.

    Args:
        parts: adapters, each with its weight, of either sign.
        method: a name from ``rankwise.combinations.COMBINATIONS``, such as "svd", a mapping ``{"name": "ties",
            "density": 0.5}``, or an object.
        rank: of every site, where fewer ranks do not hold it whole.
        error: or the largest error of every site (and so of the whole), each with as few ranks as it takes. To have
            the ranks shared out over the sites, combine exactly and :func:`rankwise.algebra.squeeze`.
        base: the weights that the adapters were trained on, needed where one of them is more than a pair (DoRA), or
            replaces whole modules: a model, its tensors by name, or a safetensors file or directory.
        seed: of what a method draws; each site derives its own.

    Returns:
        The adapter, and at each site ‖M − ΔW‖/‖M‖, M what the method makes of the changes and ΔW what was kept.

    Raises:
        SpecError: parts, method, rank or error do not go together. ShapeMismatch: a site has two shapes.
        BaseMismatch: the adapters are of different bases, or the given one is another.
        UnsupportedAdapter: the base is needed and was not given, ``exact`` is asked for what no pair holds, or an
            adapter trains single tokens' embeddings.

    >>> import torch, rankwise as rw
    >>> site = SiteAdapter("linear", rw.LowRank(torch.ones(3, 1), torch.ones(1, 2)))
    >>> adapter = Adapter(rw.LoRA(rank=1), {"proj": site}, ("proj",))
    >>> both = combine([(adapter, 0.5), (adapter, 0.25)], method="svd", rank=1)
    >>> both.adapter.sites["proj"].delta.dense()[0], round(both.error, 6)
    (tensor([0.7500, 0.7500]), 0.0)
    """
    rule: Combination = resolve(COMBINATIONS, method, "method")
    _check(parts, rule, rank, error)
    parts = [(adapter, weight) for adapter, weight in parts if weight]
    weights = None if base is None else BaseWeights(base)
    fits: dict[str, Fit] = {}
    sites: dict[str, SiteAdapter] = {}
    for path, present in _by_site(parts).items():
        site = _described(path, [adapter.sites[path] for adapter, _ in present])
        generator = site_generator(seed, path)
        change = rule([_change(adapter, path, weight, weights) for adapter, weight in present], generator)
        if isinstance(change, Tensor) and rank is None and error is None:
            raise UnsupportedAdapter(
                f"{path}: what {name_of(COMBINATIONS, rule)!r} makes of these adapters is of full rank, so no LoRA "
                f"holds it whole; expected a rank or an error, with a method that takes one, such as 'svd'"
            )
        fits[path] = fitted(change, generator, rank, error)
        sites[path] = replace(site, delta=fits[path].delta, extra={})
    return approximation(_adapter(parts, sites, weights), fits)


def _check(parts: Sequence[tuple[Adapter, float]], rule: Combination, rank: int | None, error: float | None) -> None:
    name = name_of(COMBINATIONS, rule)
    check_limits("combine", rank, error)
    for adapter, weight in parts:
        if not math.isfinite(weight):
            raise SpecError(f"combine: expected a finite number as each adapter's weight, found {weight!r}")
        if adapter.spec.trainable_token_indices is not None:
            raise UnsupportedAdapter(
                "combine: an adapter trains embeddings of single tokens (trainable_token_indices); expected changes "
                "of weights only: merge it into its base"
            )
    if not any(weight for _, weight in parts):
        raise SpecError("combine: expected at least one adapter whose weight is not zero")
    limited = rank is not None or error is not None
    if rule.truncation == "none" and limited:
        raise SpecError(f"combine: {name!r} keeps all ranks; leave rank and error out, or take method 'svd'")
    if rule.truncation == "needed" and not limited:
        raise SpecError(f"combine: {name!r} keeps a part of what it makes; expected a rank or an error")


def _by_site(parts: Sequence[tuple[Adapter, float]]) -> dict[str, list[tuple[Adapter, float]]]:
    """Site → the adapters that change it, in order."""
    by_site: dict[str, list[tuple[Adapter, float]]] = {}
    for adapter, weight in parts:
        for path in adapter.sites:
            by_site.setdefault(path, []).append((adapter, weight))
    return by_site


def _described(path: str, sites: Sequence[SiteAdapter]) -> SiteAdapter:
    """The site as the adapters agree to describe it; one that knows more of the layer than a file tells comes first."""
    first = sites[0]
    for site in sites[1:]:
        kinds = {first.kind, site.kind}
        alike = len(kinds) == 1 or kinds == {"linear", "conv1d"}
        if not alike or (site.delta.shape, site.kernel, site.groups) != (first.delta.shape, first.kernel, first.groups):
            raise ShapeMismatch(
                f"{path}: one adapter has a {first.kind} of {first.delta.shape} there and another a {site.kind} of "
                f"{site.delta.shape}; expected adapters of one base"
            )
    return next((site for site in sites if site.kind == "conv1d" or site.unlike_peft), first)


def _change(adapter: Adapter, path: str, weight: float, base: BaseWeights | None) -> Change:
    """The adapter's change at a site times its weight: by factors where its variant is no more than a pair."""
    site, variant = adapter.sites[path], adapter.spec.variant
    assert isinstance(variant, PairVariant)
    if not variant.marks:
        return LowRank(at_least_fp32(site.delta.B), at_least_fp32(site.delta.A), site.delta.scale * weight)
    if base is None:
        raise UnsupportedAdapter(
            f"{path}: how an adapter with {', '.join(variant.marks)} changes the weight depends on the weight; "
            f"expected base=, what it was trained on"
        )
    matrix = base.matrix(path, site)
    _check_base(adapter, path, base)
    described = Site(path, site.kind, site.delta.shape, site.delta.rank, site.delta.scale)
    with torch.no_grad():
        return variant.restore(described, KINDS[site.kind], matrix, site.delta, site.extra).change(matrix).mul_(weight)


def _check_base(adapter: Adapter, path: str, base: BaseWeights) -> None:
    recorded = adapter.base_probe.get(path)
    if recorded is not None and (off := gap(recorded, base.probe(path))) > room(adapter.base_quantised):
        raise BaseMismatch(
            f"{path}: the base's weights differ by {off:.0%} from those that the adapter was trained on; expected its "
            f"own base{f' {adapter.base_model}' if adapter.base_model else ''}"
        )


def _adapter(
    parts: Sequence[tuple[Adapter, float]], sites: Mapping[str, SiteAdapter], base: BaseWeights | None
) -> Adapter:
    adapters = [adapter for adapter, _ in parts]
    bias = max((adapter.spec.bias for adapter in adapters), key=("none", "lora_only", "all").index)
    targets = targets_of(adapters, sites)
    rank = max(site.delta.rank for site in sites.values())
    saved = _saved(parts, base)
    whole = tuple(dict.fromkeys(name for adapter in adapters for name in adapter.spec.modules_to_save))
    names, tasks = {adapter.base_model for adapter in adapters}, {adapter.task_type for adapter in adapters}
    return Adapter(
        LoRA(rank=rank, alpha=rank, target_modules=targets, modules_to_save=whole if saved else (), bias=bias),
        sites,
        targets,
        _probes(adapters),
        names.pop() if len(names) == 1 else None,
        saved,
        any(adapter.base_quantised for adapter in adapters),
        tasks.pop() if len(tasks) == 1 else None,
    )


def targets_of(adapters: Sequence[Adapter], sites: Mapping[str, Any]) -> str | tuple[str, ...]:
    """Names that select the sites of all adapters: those of each select its own; else a regular expression."""
    if all(adapter.targets == adapters[0].targets for adapter in adapters) and adapters[0].targets:
        return adapters[0].targets
    if all(isinstance(adapter.targets, tuple) and adapter.targets for adapter in adapters):
        return tuple(sorted({name for adapter in adapters for name in adapter.targets}))
    return "|".join(re.escape(path) for path in sorted(sites))


def _probes(adapters: Sequence[Adapter]) -> dict[str, tuple[float, ...]]:
    """All that is recorded of the base, which must be one.

    Raises:
        BaseMismatch: two adapters recorded different weights of one layer.
    """
    probes: dict[str, tuple[float, ...]] = {}
    for adapter in adapters:
        for path, recorded in adapter.base_probe.items():
            off = gap(probes.setdefault(path, recorded), recorded)
            if off > room(any(other.base_quantised for other in adapters)):
                raise BaseMismatch(
                    f"{path}: the adapters record base weights that differ by {off:.0%}; expected adapters of one base"
                )
    return probes


def _saved(parts: Sequence[tuple[Adapter, float]], base: BaseWeights | None) -> dict[str, Tensor]:
    """Modules trained whole, W₀ + Σ wᵢ(Wᵢ − W₀) over the adapters that have them."""
    names = dict.fromkeys(name for adapter, _ in parts for name in adapter.saved)
    return {name: _saved_tensor(name, parts, base) for name in names}


def _saved_tensor(name: str, parts: Sequence[tuple[Adapter, float]], base: BaseWeights | None) -> Tensor:
    present = [(adapter.saved[name], weight) for adapter, weight in parts if name in adapter.saved]
    stored = present[0][0]
    adapted = any(name.rpartition(".")[0] in adapter.sites for adapter, _ in parts)  # the base's own, beside a pair
    if adapted and all(torch.equal(tensor, stored) for tensor, _ in present):
        return stored
    rest = 1.0 - math.fsum(weight for _, weight in present)  # what is left of W₀
    if abs(rest) > 1e-12:
        start = None if base is None else base.whole(name)
        if start is None:
            raise UnsupportedAdapter(
                f"{name}: is trained whole, so what it adds is a change of the base's tensor; expected base= with that "
                f"tensor, or weights with sum 1"
            )
        present.append((start, rest))
    if any(tensor.shape != stored.shape for tensor, _ in present):
        raise ShapeMismatch(
            f"{name}: has the shapes {[tuple(t.shape) for t, _ in present]}; expected one base and task"
        )
    return torch.stack([tensor.double() * weight for tensor, weight in present]).sum(0).to(stored.dtype)
