"""What an adapter directory turned out to hold, as plain values."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Answer = Literal["yes", "after export", "no"]
Effect = Literal["refuses", "drops", "mis-scales", "misreads"]
# fold: the portable profile does not have it. rewrite: another format says it. base: it is written anew with the base's
# help. nearest: a merged checkpoint says it, or, as far as it can, a LoRA of a rank. merge: only a merged checkpoint
# does. none: rankwise alone reads it.
Remedy = Literal["fold", "rewrite", "base", "nearest", "merge", "none"]


@dataclass(frozen=True)
class Finding:
    """One thing that an engine does not read right in an adapter: see :class:`rankwise.inspection.engines.rules.Rule`.

    Attributes:
        sites: the sites or modules that it is about, or "the adapter".
    """

    about: str
    effect: Effect
    why: str
    source: str
    remedy: Remedy
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether an engine reads an adapter right as it stands.

    Attributes:
        engine: its name.
        answer: "after export": what ``rankwise export`` writes; "no": a checkpoint with the adapter merged, at best.
        reason: the gravest finding, or what to know about starting the engine.
        findings: all that it does not read right.
    """

    engine: str
    answer: Answer
    reason: str
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class FileFacts:
    """A file of the directory; ``sha256`` is None where it was not opened, or is too large to be read here."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class SiteFacts:
    """One adapted layer.

    Attributes:
        name: module path.
        kind: "linear", "conv1d", "conv2d" or "embedding"; of an adapter that rankwise alone reads, its variant.
        shape: (out, in) of the weight as one matrix.
        rank, scale: of ΔW = scale · B A; of a bottleneck, its width and 1.
        dtype: of the stored tensors.
        change: ‖ΔW‖_F; None where no pair expresses it, where the pair is relative to a changed base or too large to be
            looked at, and where it is beyond fp32.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scale: float
    dtype: str
    change: float | None


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        directory: as given.
        files: the files in it.
        peft_type, base_model: as the configuration names them.
        relative_to: the start that was taken off the base before the pairs were trained, "pissa" or "olora"; else None.
        spec: the configuration as a spec's plain data, with the variant that ``rankwise.json`` names where PEFT has no
            word for it; None where it cannot be read as one.
        sites: the adapted layers that are sound.
        replaced: the modules, by name, of which the file brings whole tensors instead of a change.
        parameters: numbers in the file.
        dtypes: type → numbers of it.
        notes: what is worth knowing, but is not refused.
        problems: what :func:`load` would refuse, each with its error's name.
        unlike_peft: convolution → what PEFT's layer for it leaves out, so that it computes another function.
        engines: who reads it right; empty where there are problems, or sites too large to be looked at.
    """

    directory: str
    files: tuple[FileFacts, ...]
    peft_type: str | None
    base_model: str | None
    relative_to: str | None
    spec: dict[str, Any] | None
    sites: tuple[SiteFacts, ...]
    replaced: tuple[str, ...]
    parameters: int
    dtypes: dict[str, int]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    unlike_peft: dict[str, str] = field(default_factory=dict)
    engines: tuple[Verdict, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
