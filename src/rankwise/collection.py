"""What evidence a plan's starts are computed from, and the passes that collect it: decided here, collected elsewhere.

Pure: sizes are read off the sites, no model is run. :func:`rankwise.evidence.collect` carries a pass out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rankwise.errors import EvidenceError
from rankwise.inits.base import EVIDENCE, Init
from rankwise.methods import nearest
from rankwise.sites import Site
from rankwise.text_table import aligned

EvidenceKind = Literal["nothing", "given", "exact", "sketch", "activations", "covariance", "weights"]

GRADIENT_METHODS = ("auto", "exact", "sketch")
GIB = 2**30
DEFAULT_BUDGET = 2 * GIB  # bytes that exact gradients may take at a time
SKETCH_OVERSAMPLE = 4  # a sketch keeps this many times the adapter's rank; LoRA-GA uses twice the rank
PROBES = 8  # random directions by which a sketch estimates the energy that it misses
EXTRA_DIRECTIONS = 8  # of the inputs, kept beyond the wanted ones while batches come in, so that these are accurate

# What each kind is called, and how many numbers are held for a weight [out, in] of which k directions are kept.
_KINDS: dict[EvidenceKind, tuple[str, Callable[[int, int, int], int]]] = {
    "nothing": ("nothing", lambda out, into, k: 0),
    "given": ("evidence collected before", lambda out, into, k: 0),
    "exact": ("exact gradients", lambda out, into, k: out * into),
    "sketch": ("sketched gradients", lambda out, into, k: (min(k, out, into) + PROBES) * (out + into)),
    "activations": ("directions of the inputs", lambda out, into, k: (k + EXTRA_DIRECTIONS) * into),
    "covariance": ("covariance of the inputs", lambda out, into, k: into * into),
    "weights": ("full-precision weights", lambda out, into, k: out * into),
}


@dataclass(frozen=True)
class Pass:
    """Sites whose evidence is collected together.

    Attributes:
        sites: in the model's order.
        bytes: what their evidence takes while it is collected, in fp32.
        directions: site name → how many are kept, where the evidence is some leading directions.
        sweeps: how often the batches are gone over.
    """

    sites: tuple[Site, ...]
    bytes: int
    directions: Mapping[str, int] = field(default_factory=dict)
    sweeps: int = 1


@dataclass(frozen=True)
class Collection:
    """What the starts are computed from, pass by pass; prints as a table.

    Attributes:
        kind: "exact" or "sketch" (both gradients), "activations", "covariance", "weights", "given" or "nothing".
        reason: why this kind.
        passes: one after the other, so that only one pass's evidence need be held at a time.
        init: the name of the initialisation that asked for it.
        reference: the file that "weights" are read from.
    """

    kind: EvidenceKind
    reason: str
    passes: tuple[Pass, ...]
    init: str = ""
    reference: str | None = None

    @property
    def title(self) -> str:
        """What is collected."""
        return _KINDS[self.kind][0]

    @property
    def from_batches(self) -> bool:
        """Whether it takes batches of data."""
        return self.kind not in ("nothing", "given", "weights")

    def __str__(self) -> str:
        headline = f"starts from {self.title}: {self.reason}"
        if self.kind in ("nothing", "given"):
            return headline
        rows = [("pass", "from", "to", "sites", "directions", "bytes held")]
        for number, part in enumerate(self.passes, 1):
            kept = {*part.directions.values()}
            span = "–".join(map(str, sorted({min(kept), max(kept)}))) if kept else "all"
            first, last = part.sites[0].name, part.sites[-1].name
            rows.append((str(number), first, last, str(len(part.sites)), span, f"{part.bytes:,}"))
        return f"{headline}\n{aligned(rows, 3)}"


def needed_evidence(
    sites: Sequence[Site], init: Init, method: str = "auto", memory_budget: int | None = None
) -> Collection:
    """What ``init`` must see to start these sites.

    Args:
        method, memory_budget: as in :func:`rankwise.attach`; for gradients only.

    Raises:
        EvidenceError: see :func:`gradient_collection`.
    """
    _check_method(method)
    name = type(init).__name__
    if init.needs == "gradients":
        return gradient_collection(sites, method, memory_budget, whole=init.needs_whole_gradient, init=name)
    directions = {site.name: init.evidence_rank(site) for site in sites} if init.needs == "activations" else {}
    reason = f"init {name} needs {init.needs}" + (f" of {init.reference}" if init.reference else "")
    return Collection(init.needs, reason, (_pass(sites, init.needs, directions),), name, init.reference)


def given_evidence(sites: Sequence[Site], init: Init, evidence: Mapping[str, Any]) -> Collection:
    """Nothing is to be collected, as evidence for all sites is at hand.

    Raises:
        EvidenceError: it lacks a site, or is not what ``init`` needs.
    """
    missing = [site.name for site in sites if site.name not in evidence]
    if missing:
        raise EvidenceError(f"evidence lacks {len(missing)} of {len(sites)} sites, the first is {missing[0]!r}")
    for site in sites:
        if not isinstance(evidence[site.name], EVIDENCE[init.needs]):
            raise EvidenceError(
                f"{site.name}: init {type(init).__name__} starts from {init.needs}, found a "
                f"{type(evidence[site.name]).__name__}; collect that, or pass batches"
            )
    return Collection("given", "nothing is collected", (_pass(sites, "given"),))


def gradient_collection(
    sites: Sequence[Site],
    method: str,
    memory_budget: int | None,
    *,
    whole: bool = False,
    oversample: int = SKETCH_OVERSAMPLE,
    sweeps: int = 1,
    init: str = "",
) -> Collection:
    """Exact gradients, in groups of sites that fit into the budget, or a sketch of all in one pass.

    Args:
        memory_budget: bytes; None: 2 GiB.
        whole: G itself is needed, not its leading directions only.
        oversample: a sketch keeps this many times a site's rank.
        sweeps: 2 lets a sketch go over the batches again, for a closer factor.

    Raises:
        EvidenceError: no such method, a sketch where G itself is needed, one site's exact gradient exceeds the budget.
    """
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    kind, reason = _exact_or_sketch(sites, method, budget, whole)
    if kind == "exact":
        passes = tuple(_pass(group, kind) for group in _groups_within(sites, budget))
    else:
        passes = (_pass(sites, kind, {site.name: oversample * site.rank for site in sites}, sweeps),)
    return Collection(kind, reason, passes, init)


def _exact_or_sketch(
    sites: Sequence[Site], method: str, budget: int, whole: bool
) -> tuple[Literal["exact", "sketch"], str]:
    """Which, and why."""
    _check_method(method)
    if whole and method == "sketch":
        raise EvidenceError(
            "this start needs the gradients themselves: expected method 'exact' or 'auto', not 'sketch'"
        )
    if method != "auto":
        return "exact" if method == "exact" else "sketch", f"method {method!r} was asked for"
    needed = sum(_bytes(site, "exact") for site in sites)
    sizes = f"{needed / GIB:.2f} GiB for {len(sites)} layers, the budget is {budget / GIB:.2f} GiB"
    if whole:
        return "exact", f"the start needs them whole ({sizes})"
    return "exact" if needed <= budget else "sketch", f"the exact ones take {sizes}"


def _check_method(method: str) -> None:
    if method not in GRADIENT_METHODS:
        raise EvidenceError(
            f"method must be one of {', '.join(GRADIENT_METHODS)}, found {method!r}{nearest(method, GRADIENT_METHODS)}"
        )


def _groups_within(sites: Sequence[Site], budget: int) -> Iterator[list[Site]]:
    """The sites in groups whose gradients take at most ``budget`` bytes, in the model's order."""
    group: list[Site] = []
    used = 0
    for site in sites:
        size = _bytes(site, "exact")
        if size > budget:
            raise EvidenceError(
                f"{site.name}: its exact gradient alone takes {size} bytes, expected at most memory_budget={budget}; "
                f"raise the budget, or use method='sketch'"
            )
        if used + size > budget:
            yield group
            group, used = [], 0
        group.append(site)
        used += size
    yield group


def _pass(
    sites: Sequence[Site], kind: EvidenceKind, directions: Mapping[str, int] | None = None, sweeps: int = 1
) -> Pass:
    directions = directions or {}
    size = sum(_bytes(site, kind, directions.get(site.name, 0)) for site in sites)
    return Pass(tuple(sites), size, directions, sweeps)


def _bytes(site: Site, kind: EvidenceKind, directions: int = 0) -> int:
    """What the evidence of one site takes in fp32."""
    return 4 * _KINDS[kind][1](*site.shape, directions)
