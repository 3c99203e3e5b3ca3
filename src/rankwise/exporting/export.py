"""export: an adapter as a given engine reads it right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from rankwise.adapted.merge import MOST_LOST, merge
from rankwise.adapter import Adapter
from rankwise.approximation import check_limits
from rankwise.attaching import detach
from rankwise.combining import combine
from rankwise.disk import whole_directory
from rankwise.errors import AttachError, CheckpointError, UnsupportedAdapter
from rankwise.exporting.base import base_facts, heads
from rankwise.exporting.diagnosis import case_of, engine_named
from rankwise.exporting.gguf_adapter import write_gguf
from rankwise.exporting.mlx_adapter import write_mlx
from rankwise.exporting.portable import common_rank, portable_profile, with_zero_pairs
from rankwise.files import check_directory_name
from rankwise.format.peft import read_adapter, write_adapter
from rankwise.format.save_load import load, portable
from rankwise.inspection.engines import described
from rankwise.inspection.engines.rules import Case, Engine, Format
from rankwise.inspection.engines.sglang import STACKED
from rankwise.inspection.facts import Finding
from rankwise.sites import ADAPTED

README, MODELFILE, GGUF = "README.txt", "Modelfile", "adapter.gguf"
_NEEDS_BASE = ("base", "nearest", "merge")  # remedies


@runtime_checkable
class SavesItself(Protocol):
    """A tokenizer, for example."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write its files."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        engine: for which.
        directory: where.
        form: an adapter in the engine's format, or a whole checkpoint with the adapter merged into it.
        start: how to start the engine with it.
        error: ‖ΔW − ΔW'‖/‖ΔW‖ over all sites, where the nearest LoRA was asked for; else 0.
    """

    engine: str
    directory: Path
    form: Literal["adapter", "merged checkpoint"]
    start: str
    error: float = 0.0


def export(
    directory: str | Path,
    engine: str,
    out: str | Path,
    *,
    base: nn.Module | None = None,
    tokenizer: SavesItself | None = None,
    rank: int | None = None,
    error: float | None = None,
    most_lost: float = MOST_LOST,
) -> Export:
    """Write an adapter as an engine reads it right: in its format, or merged where no adapter of the engine's says it.

    PEFT, vLLM and SGLang get the portable profile (:func:`rankwise.exporting.portable.portable_profile`), llama.cpp and
    Ollama a GGUF file, mlx-lm its own layout. What each would not read right otherwise is told by ``rankwise.doctor``.

    Args:
        directory: rankwise's or PEFT's.
        engine: a name from ``rankwise.inspection.engines.ENGINES``.
        out: a new or empty directory, written as a whole.
        base: the model that the adapter is for. GGUF and mlx-lm's layout need it for its layers' names, and no weights
            of it (it may be on the meta device); a merged checkpoint, DoRA as LoRA, and pairs that are relative to a
            changed base need them. It stays as it is.
        tokenizer: to be written beside a merged checkpoint.
        rank: write the nearest plain LoRA of this rank instead of what the adapter is.
        error: or the nearest of this error at each site, with as few ranks as it takes.
        most_lost: as for :func:`rankwise.merge`.

    Raises:
        SpecError: there is no such engine, or rank and error do not go together.
        UnsupportedAdapter: the base is needed and was not given, or only rankwise reads the adapter.
        CheckpointError: ``out`` holds files, or the adapter cannot be read. MergeError: it cannot be merged.
        AttachError: the base carries adapters. WriteError: the system refuses. Nothing is written on any of these.
    """
    chosen, folder, target = engine_named(engine), Path(directory), Path(out)
    check_limits("export", rank, error)
    check_new(target)
    _check_plain(base)
    case = case_of(folder, base)
    limited = rank is not None or error is not None
    findings = [finding for finding in chosen.findings(case) if not (limited and finding.remedy == "nearest")]
    _check_possible(chosen, folder, findings, base)
    if base is not None and any(finding.remedy in ("nearest", "merge") for finding in findings):
        start = _start(chosen.start_merged, target, case)
        with whole_directory(target) as place:
            _write_merged(folder, base, place, most_lost)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
            if chosen.format == "ollama":
                (place / MODELFILE).write_text("FROM .\n", encoding="utf-8")
            _write_readme(place, chosen, start, findings)
        return Export(chosen.label, target, "merged checkpoint", start)
    adapter, lost = _adapter(folder, case, base), 0.0
    if limited:
        approximation = combine([(adapter, 1.0)], "svd", rank, error, base=base)
        adapter, lost = replace(approximation.adapter, base_model=adapter.base_model), approximation.error
    if chosen.label == "SGLang" and base is not None:
        adapter = with_zero_pairs(adapter, base, STACKED)
    start = _start(chosen.start, target, case, common_rank(adapter))
    with whole_directory(target) as place:
        _WRITERS[chosen.format](adapter, base, place)
        _write_readme(place, chosen, start, findings)
    return Export(chosen.label, target, "adapter", start, lost)


def needs_weights(
    directory: str | Path,
    engine: str,
    base: nn.Module | None = None,
    *,
    rank: int | None = None,
    error: float | None = None,
) -> bool:
    """Whether :func:`export` needs the weights of the base, which may be given here on the meta device.

    Raises:
        SpecError, BrokenFile: see :func:`export`.
    """
    case = case_of(Path(directory), base)
    remedies = {finding.remedy for finding in engine_named(engine).findings(case)}
    dora = case.facts.spec is not None and case.facts.spec["variant"] == "dora"
    limited = rank is not None or error is not None
    return case.facts.relative_to is not None or "merge" in remedies or (dora if limited else "nearest" in remedies)


def check_new(out: Path) -> None:
    """Refuse a directory that holds files.

    Raises:
        CheckpointError: as it says. RecipeError: no directory can be there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: expected a new or empty directory, found files in it; choose another")
    check_directory_name(out)


def _check_plain(base: nn.Module | None) -> None:
    if base is not None and ADAPTED in vars(base):
        raise AttachError("export: the base carries adapters; expected the pretrained model: rankwise.detach(model)")


def _check_possible(engine: Engine, folder: Path, findings: Sequence[Finding], base: nn.Module | None) -> None:
    for finding in findings:
        if finding.remedy == "none":
            raise UnsupportedAdapter(f"{folder}: {engine.label} {described(finding)}")
        if finding.remedy in _NEEDS_BASE and base is None:
            raise UnsupportedAdapter(
                f"{folder}: {engine.label} {described(finding)}; expected the base model for that: base=, or --base"
            )
    if engine.format in ("gguf", "ollama", "mlx") and base is None:
        raise UnsupportedAdapter(
            f"{folder}: {engine.label} calls layers by names that depend on the base; expected the base model: base=, "
            f"or --base"
        )


def _adapter(folder: Path, case: Case, base: nn.Module | None) -> Adapter:
    """The adapter, as changes of the pretrained weights."""
    if case.facts.relative_to is None or base is None:
        return read_adapter(folder)
    try:
        adapter = portable(load(base, folder))
    finally:
        _take_off(base)
    return replace(adapter, base_model=case.facts.base_model)


def _write_merged(folder: Path, base: Any, place: Path, most_lost: float) -> None:
    try:
        load(base, folder)
        merge(base, most_lost=most_lost)
        base.save_pretrained(place)
    finally:
        _take_off(base)


def _take_off(base: nn.Module) -> None:
    if ADAPTED in vars(base):
        detach(base)


def _write_portable(adapter: Adapter, base: nn.Module | None, place: Path) -> None:
    write_adapter(portable_profile(adapter), place)


def _write_gguf(adapter: Adapter, base: nn.Module | None, place: Path) -> None:
    assert base is not None
    write_gguf(adapter, base_facts(base), heads(base), place / GGUF)


def _write_ollama(adapter: Adapter, base: nn.Module | None, place: Path) -> None:
    _write_gguf(adapter, base, place)
    model = adapter.base_model or "BASE"
    (place / MODELFILE).write_text(f"FROM {model}\nADAPTER ./{GGUF}\n", encoding="utf-8")


def _write_mlx(adapter: Adapter, base: nn.Module | None, place: Path) -> None:
    assert base is not None
    write_mlx(adapter, base_facts(base), place)


# Format → what writes it.
_WRITERS: dict[Format, Callable[[Adapter, nn.Module | None, Path], None]] = {
    "peft": _write_portable,
    "gguf": _write_gguf,
    "ollama": _write_ollama,
    "mlx": _write_mlx,
}


def _start(command: str, out: Path, case: Case, rank: int = 0) -> str:
    return command.format(out=out, base=case.facts.base_model or "BASE", rank=rank)


def _write_readme(place: Path, engine: Engine, start: str, findings: Sequence[Finding]) -> None:
    lines = [f"For {engine.label} ({engine.version}), written by rankwise export.", "", start]
    if findings:
        lines += ["", "As it stood, the engine", *(f"- {described(finding)}" for finding in findings)]
    (place / README).write_text("\n".join(lines) + "\n", encoding="utf-8")
