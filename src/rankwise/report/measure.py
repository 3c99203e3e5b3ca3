"""An adapter, and the base where it is at hand → the numbers that the page shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapter import Adapter, SiteAdapter
from rankwise.algebra.low_rank import LowRank
from rankwise.analysis import (
    Amplification,
    amplification,
    effective_rank,
    intruder_dimensions,
    merge_loss,
    relative_size,
    stable_rank,
    subspace_similarity,
)
from rankwise.errors import BaseMismatch
from rankwise.layers.kinds import kind_or_none

LOST_TO = ("bfloat16", "nf4")
INTRUDERS_AMONG = 10


@dataclass(frozen=True)
class SiteMeasures:
    """One site's change ΔW in numbers.

    Attributes:
        name: module path.
        module: what layers alike are put together by, see :func:`module_labels`.
        layer: the first number in the path; None where there is none.
        shape, rank, scale: of the pair.
        change: ‖ΔW‖_F.
        singular_values: of ΔW, descending.
        effective_rank, stable_rank: of ΔW.
        against_base: what needs the base's weight; None without it.
    """

    name: str
    module: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    scale: float
    change: float
    singular_values: list[float]
    effective_rank: float
    stable_rank: float
    against_base: AgainstBase | None


@dataclass(frozen=True)
class AgainstBase:
    """A change beside the weight that it changes.

    Attributes:
        relative_size: ‖ΔW‖_F / ‖W‖_F.
        amplification: None where ΔW is zero.
        intruders: intruder dimensions among the leading :data:`INTRUDERS_AMONG` directions; None where not counted.
        lost: storage → share of ΔW that merging into it loses.
    """

    relative_size: float
    amplification: Amplification | None
    intruders: int | None
    lost: dict[str, float]


@dataclass(frozen=True)
class Similarity:
    """φ between two adapters' input directions, layers alike averaged.

    Attributes:
        first, second: their names.
        by_module: module → φ [r1][r2], the mean over its layers.
        by_chance: module → the expectation for random directions at (r1, r2): max(r1, r2) / in.
    """

    first: str
    second: str
    by_module: dict[str, list[list[float]]]
    by_chance: dict[str, float]


def module_labels(names: Iterable[str]) -> dict[str, str]:
    """Module path → what layers alike are put together by: as few of its last parts as tell apart those of one layer.

    >>> module_labels(["layers.0.attn.q", "layers.1.attn.q"])
    {'layers.0.attn.q': 'q', 'layers.1.attn.q': 'q'}
    >>> module_labels(["layer.0.attn.dense", "layer.0.dense"])
    {'layer.0.attn.dense': 'attn.dense', 'layer.0.dense': '*.dense'}
    """
    starred = {name: _without_layer(name).split(".") for name in names}
    layers = {name: layer_of(name) for name in starred}
    for count in range(1, 1 + max(map(len, starred.values()), default=0)):
        labels = {name: ".".join(parts[-count:]) for name, parts in starred.items()}
        if len({(labels[name], layers[name]) for name in starred}) == len(starred):
            break
    return labels if starred else {}


def layer_of(name: str) -> int | None:
    """The first number in a module path."""
    return next((int(part) for part in name.split(".") if _is_number(part)), None)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _without_layer(name: str) -> str:
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if _is_number(part)), None)
    return name if place is None else ".".join([*parts[:place], "*", *parts[place + 1 :]])


Watch = Callable[[Sequence[Any]], Iterable[Any]]


def measure(
    adapter: Adapter, base: nn.Module | None = None, *, intruders: bool = False, watch: Watch = iter
) -> list[SiteMeasures]:
    """Every site of an adapter, by its low-rank change s·BA; DoRA's magnitudes are not in it.

    Without a base no more than the factors is needed, so that any size of model can be looked at. With it one layer is
    worked on at a time, in pieces.

    Args:
        base: the model that the adapter was made for, without it.
        intruders: count intruder dimensions: an eigendecomposition a layer, whose four copies of the smaller side
            squared are the most memory, and most of the time, that anything here takes.
        watch: shows progress over the sites.

    Raises:
        BaseMismatch: the base lacks a site, or has it in another shape.
    """
    labels = module_labels(adapter.sites)
    layers = None if base is None else dict(base.named_modules())
    with torch.no_grad():
        return [
            _site(
                name,
                labels[name],
                site,
                None if layers is None else _against_base(layers, name, site, intruders=intruders),
            )
            for name, site in watch(list(adapter.sites.items()))
        ]


def _site(name: str, module: str, site: SiteAdapter, against: AgainstBase | None) -> SiteMeasures:
    singular = site.delta.svd()[1]
    return SiteMeasures(
        name=name,
        module=module,
        layer=layer_of(name),
        shape=site.delta.shape,
        rank=site.delta.rank,
        scale=site.delta.scale,
        change=float(torch.linalg.vector_norm(singular.double())),
        singular_values=singular.tolist(),
        effective_rank=effective_rank(singular),
        stable_rank=stable_rank(singular),
        against_base=against,
    )


def _against_base(layers: Mapping[str, nn.Module], name: str, site: SiteAdapter, *, intruders: bool) -> AgainstBase:
    weight, delta = _weight(layers, name, site.delta), site.delta
    delta = LowRank(delta.B.to(weight.device), delta.A.to(weight.device), delta.scale)
    changed = bool(delta.norm())
    among = min(INTRUDERS_AMONG, *delta.shape)
    return AgainstBase(
        relative_size=relative_size(delta, weight),
        amplification=amplification(delta, weight) if changed else None,
        intruders=intruder_dimensions(delta, weight, among) if intruders else None,
        lost={storage: merge_loss(delta, weight, storage) for storage in LOST_TO},
    )


def _weight(layers: Mapping[str, nn.Module], name: str, delta: LowRank) -> Tensor:
    layer: Any = layers.get(name)
    kind = None if layer is None else kind_or_none(layer)
    if kind is None:
        raise BaseMismatch(f"the base has no layer {name} that could carry an adapter; it is another model's")
    if kind.shape(layer) != delta.shape:
        raise BaseMismatch(f"{name}: {delta.shape} in the adapter, {kind.shape(layer)} in the base; it is another's")
    return kind.weight(layer)


def similarities(adapters: Mapping[str, Adapter]) -> list[Similarity]:
    """φ of every pair of adapters, over the sites that both have."""
    names = list(adapters)
    return [
        similarity(first, adapters[first], second, adapters[second])
        for i, first in enumerate(names)
        for second in names[i + 1 :]
    ]


def similarity(first: str, one: Adapter, second: str, two: Adapter) -> Similarity:
    """φ of ΔW's right-singular vectors, the input directions that the change reads.

    The same span as that of A's, which the paper takes, but in the order of what they do to the weight, and the same
    whatever pair holds ΔW.
    """
    phis_by_module: defaultdict[str, list[Tensor]] = defaultdict(list)
    chance: dict[str, float] = {}
    labels = module_labels([*one.sites])
    with torch.no_grad():
        for name, site in one.sites.items():
            other = two.sites.get(name)
            if other is None or other.delta.shape[1] != site.delta.shape[1]:
                continue
            into = site.delta.shape[1]
            directions = [_directions(part.delta) for part in (site, other)]
            if min(map(len, directions)) == 0:  # nothing there yet: A = 0 at the start
                continue
            phi = subspace_similarity(*directions)
            module = labels[name]
            if not phis_by_module[module] or phis_by_module[module][0].shape == phi.shape:
                phis_by_module[module].append(phi)
                chance[module] = max(phi.shape) / into
    by_module = {module: torch.stack(phis).mean(0).tolist() for module, phis in phis_by_module.items()}
    return Similarity(first, second, by_module, chance)


def _directions(delta: LowRank) -> Tensor:
    """ΔW's input directions, weighed by its singular values; A's where ΔW is zero."""
    _, s, v = delta.svd()
    if not bool(s.any()):
        _, s, v = LowRank(torch.eye(delta.rank), delta.A).svd()
    there = s > s[0] * torch.finfo(s.dtype).eps * max(delta.shape)
    return (v[:, there] * s[there]).T


def by_module(sites: Sequence[SiteMeasures]) -> Iterator[tuple[str, list[SiteMeasures]]]:
    """Layers alike, in the order of the model."""
    groups: defaultdict[str, list[SiteMeasures]] = defaultdict(list)
    for site in sites:
        groups[site.module].append(site)
    yield from groups.items()
