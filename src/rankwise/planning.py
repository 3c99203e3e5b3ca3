"""plan: which modules a spec adapts, with which rank and scale. Pure: nothing is changed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from rankwise.collection import Collection, needed_evidence
from rankwise.errors import SpecError, TargetError
from rankwise.inits.base import Init
from rankwise.layers.kinds import kind_of, kind_or_none
from rankwise.left_out import is_followed, linear_layers, may_be_small, notes_on_left_out
from rankwise.methods import nearest
from rankwise.patterns import in_every_layer, keys_under, matching, matching_ends, names_by_end, pattern_values
from rankwise.sites import Site, base_modules
from rankwise.spec import LoRA
from rankwise.text_table import aligned
from rankwise.trained_beside import TrainedBeside, trained_beside
from rankwise.variants.base import Variant

T = TypeVar("T")


class Plan(list[Site]):
    """The sites of a spec on a model, in the model's order, and what their starts are computed from; prints as tables.

    Attributes:
        variant: what is put on each site.
        evidence: which evidence is collected, in which passes.
        left_out: what "all-linear" did not take, a line each.
        beside: what is trained beside the pairs.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        variant: Variant,
        evidence: Collection,
        left_out: Sequence[str] = (),
        beside: TrainedBeside | None = None,
    ) -> None:
        super().__init__(sites)
        self.variant = variant
        self.evidence = evidence
        self.left_out = left_out
        self.beside = beside or TrainedBeside()

    @property
    def parameters(self) -> int:
        """Trained numbers in all."""
        return sum(self.variant.parameters(site) for site in self)

    def __str__(self) -> str:
        rows = [("site", "kind", "out × in", "rank", "scale", "parameters")]
        for s in self:
            shape, count = f"{s.shape[0]} × {s.shape[1]}", f"{self.variant.parameters(s):,}"
            rows.append((s.name, s.kind, shape, str(s.rank), f"{s.scale:.4g}", count))
        rows.append((f"{len(self)} sites", "", "", "", "", f"{self.parameters:,}"))
        notes = [f"trained beside: {line}" for line in self.beside.lines()]
        notes += [f"left out: {note}" for note in self.left_out]
        return "\n".join([aligned(rows, 2), "", str(self.evidence), *notes])


def plan(model: nn.Module, spec: LoRA, *, method: str = "auto", memory_budget: int | None = None) -> Plan:
    """The sites that ``spec`` adapts on ``model``, and the evidence for their starts; nothing is run or changed.

    Args:
        method, memory_budget: as in :func:`rankwise.attach`.

    Raises:
        TargetError: a target matches nothing, only in part, or a module that cannot carry an adapter; a pattern in
            ``rank_pattern``, ``alpha_pattern`` or ``exclude_modules`` matches no target.
        SpecError: a rank that the site or the init cannot serve.
        EvidenceError: a method or a budget that cannot serve the init.
    """
    assert isinstance(spec.init, Init) and isinstance(spec.variant, Variant)
    sites = planned_sites(model, spec)
    return planned(model, spec, sites, needed_evidence(starting_sites(sites, spec), spec.init, method, memory_budget))


def planned(model: nn.Module, spec: LoRA, sites: Sequence[Site], evidence: Collection) -> Plan:
    """The plan of these sites, with what is left out and what is trained beside; errors as for :func:`plan`."""
    assert isinstance(spec.variant, Variant)
    beside = trained_beside(model, spec, [site.name for site in sites])
    return Plan(sites, spec.variant, evidence, left_out(model, spec, sites), beside)


def left_out(model: nn.Module, spec: LoRA, sites: Iterable[Site]) -> list[str]:
    """What "all-linear" did not take, a line each."""
    if spec.target_modules != "all-linear":
        return []
    modules = base_modules(model)
    excluded = _matches("exclude_modules", modules, spec.exclude_modules) if spec.exclude_modules else set()
    excluded |= modules.keys() - _in_layers(list(modules), spec)
    return notes_on_left_out(model, [site.name for site in sites], spec.modules_to_save, excluded)


def starting_sites(sites: Iterable[Site], spec: LoRA) -> list[Site]:
    """The sites with the ranks that their starts have, which a variant that prunes makes larger."""
    assert isinstance(spec.variant, Variant)
    return [spec.variant.starting(site) for site in sites]


def planned_sites(model: nn.Module, spec: LoRA) -> list[Site]:
    """The sites alone; errors as for :func:`plan`."""
    whole_modules(model, spec.modules_to_save)
    targeted = target_layers(model, spec.target_modules, spec.exclude_modules, spec.modules_to_save)
    chosen = {name: targeted[name] for name in _in_layers(list(targeted), spec)}
    names = list(chosen)
    ranks = pattern_values("rank_pattern key", spec.rank_pattern, names, spec.rank)
    alphas = pattern_values("alpha_pattern key", spec.alpha_pattern, names, spec.alpha)
    _check_patterns("rank_pattern", spec.rank_pattern, names)
    _check_patterns("alpha_pattern", spec.alpha_pattern, names)
    small = may_be_small(chosen) if spec.target_modules == "all-linear" else set()
    sites: list[Site] = []
    refusals: list[SpecError] = []
    for name, layer in chosen.items():
        try:
            sites.append(_site(name, layer, spec, ranks[name], alphas[name]))
        except SpecError as error:
            refusals.append(error)
            if name not in small:  # for the rank, and left out
                raise
    if not sites:
        raise refusals[0]
    return sites


def _in_layers(names: list[str], spec: LoRA) -> list[str]:
    exact = () if isinstance(spec.target_modules, str) else spec.target_modules
    layers: Any = spec.layers_to_transform
    return names if layers is None else in_every_layer(names, layers, spec.layers_pattern, exact)


def _site(name: str, layer: nn.Module, spec: LoRA, rank: int, alpha: float) -> Site:
    kind = kind_of(layer)
    assert isinstance(spec.variant, Variant) and isinstance(spec.init, Init)
    site = Site(name, kind.name, kind.shape(layer), rank, spec.scale(rank, alpha))
    spec.variant.check_site(site, kind)
    if spec.variant.takes_start:
        spec.init.check(spec.variant.starting(site))
    return site


def target_layers(
    model: nn.Module,
    targets: str | Iterable[str] = "all-linear",
    excluded: str | Iterable[str] = (),
    whole: Iterable[str] = (),
) -> dict[str, nn.Module]:
    """Module path → layer for the chosen targets, in the model's order; a shared module counts once.

    Raises:
        TargetError: see :func:`plan`.
    """
    if kind_or_none(model) is not None:
        raise TargetError(
            f"the model is itself a {type(model).__name__}, so its layer has no name to save an adapter under; "
            f"expected layers inside a model: wrap it, as torch.nn.Sequential(layer) does"
        )
    modules = base_modules(model)
    trained_whole = set(keys_under(whole, modules))
    matched = _select(modules, targets)
    left_out = _matches("exclude_modules", modules, excluded) if excluded else set()
    chosen = {name: modules[name] for name in matched if name not in left_out and name not in trained_whole}
    if not chosen:
        raise TargetError(f"target_modules {targets!r} leaves no module to adapt after exclude_modules {excluded!r}")
    return chosen


def whole_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Module path → module for ``modules_to_save``, in the model's order; one inside another is part of that.

    Raises:
        TargetError: a name matches no module, or a mere list of modules.
    """
    modules = base_modules(model)
    matched = _matches("modules_to_save", modules, tuple(names))
    for name in matched:
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise TargetError(f"modules_to_save matches {name!r}, a {type(modules[name]).__name__}; name modules in it")
    inside = {name for name in matched for other in matched if name.startswith(f"{other}.")}
    return {name: module for name, module in modules.items() if name in matched - inside}


def _select(modules: dict[str, nn.Module], targets: str | Iterable[str]) -> list[str]:
    if targets == "all-linear":
        linear = linear_layers(modules)
        if not linear:
            raise TargetError(
                "target_modules 'all-linear' matches nothing: the model has no linear layer but its head, and no "
                "convolution with torch's own forward"
            )
        return linear
    targeted = _matches("target_modules", modules, targets)
    matched = [name for name in modules if name in targeted]
    for name in matched:
        if not is_followed(modules[name]):
            raise TargetError(
                f"target_modules matches {name!r}, a {type(modules[name]).__name__}, which cannot carry an adapter; "
                f"expected Linear, Conv1D, Conv2d or Embedding with their own forward: name layers inside it"
            )
    return matched


def _matches(field: str, modules: dict[str, nn.Module], patterns: str | Iterable[str]) -> set[str]:
    """Paths that a regular expression matches whole, or that a list of (last parts of) names matches."""
    if isinstance(patterns, str):
        matched = matching(field, patterns, list(modules))
        if not matched:
            raise TargetError(
                f"{field} {patterns!r} matches no module as a regular expression of the whole path; "
                f"for module names give a list such as [{patterns!r}]; the model has {_examples(modules)}"
            )
        return matched
    by_end = names_by_end(modules)
    hits = {p: by_end.get(p, set()) for p in patterns}
    missing = [p for p, names in hits.items() if not names]
    if missing:
        known = {name.rpartition(".")[2] for name in modules if kind_or_none(modules[name])}
        hints = "".join(nearest(p, known) for p in missing[:1])
        others = [p for p in hits if p not in missing]
        raise TargetError(
            f"{field}: {', '.join(map(repr, missing))} match no module"
            + (f" (while {', '.join(map(repr, others))} do)" if others else "")
            + f"{hints}; the model has {_examples(modules)}"
        )
    return set().union(*hits.values()) if hits else set()


def _examples(modules: dict[str, nn.Module]) -> str:
    names = list(dict.fromkeys(n.rpartition(".")[2] for n, m in modules.items() if kind_or_none(m)))
    return f"adaptable modules named {', '.join(names[:12])}" if names else "no adaptable module"


def _check_patterns(field: str, pattern: Mapping[str, Any], chosen: Sequence[str]) -> None:
    for key, matched in matching_ends(field, pattern, chosen).items():
        if not matched:
            raise TargetError(f"{field} key {key!r} matches none of the adapted modules")
