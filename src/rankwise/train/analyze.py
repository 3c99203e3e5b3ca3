"""`rankwise analyze`: saved adapters, their base and real batches → a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track

import rankwise as rw
from rankwise.adapter import Adapter
from rankwise.errors import CheckpointError, RecipeError
from rankwise.files import read_json, sha256
from rankwise.format.names import TENSORS
from rankwise.format.peft import read_adapter
from rankwise.report.history import points
from rankwise.report.measure import measure, similarities
from rankwise.report.page import Report
from rankwise.train.model.generation import before_and_after, refuse_classifier
from rankwise.train.model.merged import load_base
from rankwise.train.run.report_parts import Measured, adapter_part, low_rank_part_only, texts, versions


def analyze(
    directories: Sequence[Path],
    base: str | None,
    console: Console,
    *,
    batches: str | None = None,
    batch_count: int = 8,
    prompts: Sequence[str] = (),
    intruders: bool = False,
    without_base: bool = False,
) -> Report:
    """A report on saved adapters.

    Args:
        base: their base model; by default the one that each names.
        batches: training data, from whose batches the alignment is measured.
        batch_count: how many of them, of 4 samples of 128 tokens.
        prompts: texts to continue without and with each adapter.
        intruders: count intruder dimensions too: an eigendecomposition of every weight.
        without_base: look at the factors only, and load no model.

    Raises:
        CheckpointError: a directory that is no sound adapter. RecipeError: two adapters of one name.
    """
    if without_base and (batches or prompts or intruders):
        raise RecipeError("analyze: --without-base loads no model, which --batches, --prompt and --intruders need")
    for directory in directories if prompts else ():
        refuse_classifier(directory)
    adapters = _read(directories)
    parts, samples = [], []
    for name, (directory, adapter) in adapters.items():
        if without_base:
            sites = measure(adapter, watch=_watch(name, console))
            parts.append(adapter_part(name, directory, adapter.spec, sites))
            continue
        model, tokenizer = load_base(directory, base)
        sites = measure(adapter, model, intruders=intruders, watch=_watch(name, console))
        alignment: Measured = {}
        if batches is not None:
            from rankwise.train.adapter_alignment import (
                adapter_alignment,  # it needs the trainer, which takes seconds to load
            )

            alignment = adapter_alignment(directory, base, batches, batch_count, console)
        parts.append(adapter_part(name, directory, adapter.spec, sites, alignment))
        if prompts:
            rw.load(model, directory)
            samples += [before_and_after(model, tokenizer, prompt) for prompt in prompts]
    title = " · ".join(adapters)
    return Report(
        title=title,
        adapters=parts,
        headline=_headline([adapter for _, adapter in adapters.values()]),
        similarities=similarities({name: adapter for name, (_, adapter) in adapters.items()}),
        samples=[texts(sample) for sample in samples],
        runs={name: logged for name, (directory, _) in adapters.items() if (logged := _logged(directory))},
        versions=versions(),
        notes=[
            *dict.fromkeys(note for _, adapter in adapters.values() for note in low_rank_part_only(adapter)),
            *([_ABOUT_BATCHES.format(batches=batches, count=batch_count)] if batches else []),
        ],
    )


_ABOUT_BATCHES = (
    "Agreement with full fine-tuning's step: from the mean gradient of {count} batches of {batches}, as if training "
    "went on from the adapter's file."
)


def _read(directories: Sequence[Path]) -> dict[str, tuple[Path, Adapter]]:
    """Name → adapter; a name is as much of the path's end as tells them apart."""
    for parts in range(1, 1 + max(len(directory.resolve().parts) for directory in directories)):
        names = ["/".join(directory.resolve().parts[-parts:]) for directory in directories]
        if len(set(names)) == len(names):
            return {name: (path, read_adapter(path)) for name, path in zip(names, directories, strict=True)}
    raise RecipeError(f"analyze: expected different adapters, found {directories[0]} twice")


def _logged(directory: Path) -> list[dict[str, Any]]:
    """What the run that ended with this very adapter logged: a report that names its file's hash lies beside it."""
    path = directory.parent / "report.json"
    try:
        report = read_json(path)
        (part,), (rows,) = report["adapters"], report["runs"].values()
        ours = part["files"][TENSORS] == sha256(directory / TENSORS)
        logged = [{**row} for row in rows]  # mappings all
        for key in ("loss", "eval_loss"):
            points(logged, key)
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return []  # another program's, or none
    return logged if ours and isinstance(rows, list) else []


def _watch(name: str, console: Console) -> Any:
    return lambda sites: track(sites, description=f"Measuring {escape(name)}", console=console, transient=True)


def _headline(adapters: Sequence[Adapter]) -> dict[str, str]:
    if len(adapters) > 1:
        return {"adapters": str(len(adapters))}
    deltas = [site.delta for site in adapters[0].sites.values()]
    numbers = sum(delta.A.numel() + delta.B.numel() for delta in deltas)
    ranks = sorted({delta.rank for delta in deltas})
    return {
        "sites": str(len(deltas)),
        "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "parameters": f"{numbers:,}",
        "base model": Path(adapters[0].base_model or "not named").name,
    }
