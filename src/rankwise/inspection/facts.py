"""What an adapter directory turned out to hold, as plain values."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Answer = Literal["yes", "after export", "no"]


@dataclass(frozen=True)
class Verdict:
    """Whether an engine reads an adapter right, and why or how."""

    engine: str
    answer: Answer
    reason: str


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
