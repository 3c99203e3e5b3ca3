"""export: an adapter as a given engine reads it right."""

import shlex
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
from rankwise.exporting.diagnosis import engine_named, facts_of
from rankwise.exporting.gguf_adapter import write_gguf
from rankwise.exporting.mlx_adapter import state_rope_theta, write_mlx
from rankwise.exporting.portable import common_rank, portable_profile, with_zero_pairs
from rankwise.files import check_directory_name
from rankwise.format.peft import read_adapter, write_adapter
from rankwise.format.save_load import load, portable
from rankwise.inspection.engines import described
from rankwise.inspection.engines.rules import Case, Engine, Format
from rankwise.inspection.engines.sglang import STACKED
from rankwise.inspection.facts import Finding, Inspection, Remedy
from rankwise.sites import ADAPTED

README, MODELFILE, GGUF = "README.txt", "Modelfile", "adapter.gguf"
_MERGED: tuple[Remedy, ...] = ("nearest", "merge")
_NEEDS_BASE: tuple[Remedy, ...] = ("base", *_MERGED)


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
    return Order.of(directory, engine, rank, error).write(out, base, tokenizer, most_lost)


@dataclass(frozen=True)
class Order:
    """An export that is asked for: the adapter is looked at, and what the engine needs of its base can be said.

    Attributes:
        folder: the adapter's.
        facts: what is in it.
        rank, error: of the nearest LoRA, where that is asked for.
    """

    engine: Engine
    folder: Path
    facts: Inspection
    rank: int | None = None
    error: float | None = None

    @classmethod
    def of(cls, directory: str | Path, engine: str, rank: int | None = None, error: float | None = None) -> "Order":
        """Look at the adapter.

        Raises:
            SpecError, BrokenFile: see :func:`export`.
        """
        check_limits("export", rank, error)
        return cls(engine_named(engine), Path(directory), facts_of(Path(directory)), rank, error)

    @property
    def limited(self) -> bool:
        """Whether the nearest LoRA is asked for."""
        return self.rank is not None or self.error is not None

    def findings(self, base: nn.Module | None) -> list[Finding]:
        """What the engine would not read right, but for what the nearest LoRA does away with."""
        found = self.engine.findings(Case(self.facts, None if base is None else base_facts(base)))
        return [finding for finding in found if not (self.limited and finding.remedy == "nearest")]

    @property
    def needs_layers(self) -> bool:
        """Whether the base is needed, if only on the meta device."""
        return self.engine.format != "peft" or any(finding.remedy in _NEEDS_BASE for finding in self.findings(None))

    def needs_weights(self, base: nn.Module | None) -> bool:
        """Whether the base's weights are needed as well, and not only its layers, which are given here."""
        dora = self.facts.spec is not None and self.facts.spec["variant"] == "dora"
        merged = any(finding.remedy in _MERGED for finding in self.findings(base))
        return merged or self.facts.relative_to is not None or (self.limited and dora)

    def write(
        self,
        out: str | Path,
        base: nn.Module | None = None,
        tokenizer: SavesItself | None = None,
        most_lost: float = MOST_LOST,
    ) -> Export:
        """Write it: see :func:`export`."""
        target, findings = Path(out), self.findings(base)
        check_new(target)
        self._check_possible(findings, base)
        if any(finding.remedy in _MERGED for finding in findings):
            start = self._start(self.engine.start_merged, target)
            with whole_directory(target) as place:
                _write_merged(self.folder, base, place, most_lost)
                if tokenizer is not None:
                    tokenizer.save_pretrained(place)
                if self.engine.format == "ollama":
                    (place / MODELFILE).write_text("FROM .\n", encoding="utf-8")
                if self.engine.format == "mlx":
                    state_rope_theta(place)
                self._write_readme(place, start, findings)
            return Export(self.engine.label, target, "merged checkpoint", start)
        adapter, lost = self._adapter(base)
        start = self._start(self.engine.start, target, common_rank(adapter))
        with whole_directory(target) as place:
            _WRITERS[self.engine.format](adapter, base, place)
            self._write_readme(place, start, findings)
        return Export(self.engine.label, target, "adapter", start, lost)

    def _check_possible(self, findings: Sequence[Finding], base: nn.Module | None) -> None:
        if base is not None and ADAPTED in vars(base):
            raise AttachError(
                "export: the base carries adapters; expected the pretrained model: rankwise.detach(model)"
            )
        for finding in findings:
            if finding.remedy == "none":
                raise UnsupportedAdapter(f"{self.folder}: {self.engine.label} {described(finding)}")
            if finding.remedy in _NEEDS_BASE and base is None:
                raise UnsupportedAdapter(
                    f"{self.folder}: {self.engine.label} {described(finding)}; expected the base model for that: "
                    f"base=, or --base"
                )
        if self.engine.format != "peft" and base is None:
            raise UnsupportedAdapter(
                f"{self.folder}: {self.engine.label} calls layers by names that depend on the base; expected the base "
                f"model: base=, or --base"
            )

    def _adapter(self, base: nn.Module | None) -> tuple[Adapter, float]:
        """The adapter as changes of the pretrained weights, and what was lost on the way."""
        lost = 0.0
        if self.facts.relative_to is None or base is None:
            adapter = read_adapter(self.folder)
        else:
            try:
                adapter = replace(portable(load(base, self.folder)), base_model=self.facts.base_model)
            finally:
                _take_off(base)
        if self.limited:
            nearest = combine([(adapter, 1.0)], "svd", self.rank, self.error, base=base)
            adapter, lost = replace(nearest.adapter, base_model=adapter.base_model), nearest.error
        if self.engine.label == "SGLang" and base is not None:
            adapter = with_zero_pairs(adapter, base, STACKED)
        return adapter, lost

    def _start(self, command: str, out: Path, rank: int = 0) -> str:
        base = shlex.quote(self.facts.base_model or "BASE")  # a stranger's file may name anything
        return command.format(out=shlex.quote(str(out)), path=repr(str(out)), base=base, rank=rank)

    def _write_readme(self, place: Path, start: str, findings: Sequence[Finding]) -> None:
        lines = [f"For {self.engine.label} ({self.engine.version}), written by rankwise export.", "", start]
        if findings:
            lines += ["", "As the adapter stood, the engine", *(f"- {described(finding)}" for finding in findings)]
        (place / README).write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_new(out: Path) -> None:
    """Refuse a directory that holds files.

    Raises:
        CheckpointError: as it says. RecipeError: no directory can be there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: expected a new or empty directory, found files in it; choose another")
    check_directory_name(out)


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
    model = " ".join((adapter.base_model or "BASE").split())  # one line, whatever the adapter's file says
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
