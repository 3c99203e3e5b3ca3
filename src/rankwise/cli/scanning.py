"""`rankwise inspect --deep`: an adapter beside its base and ordinary adapters, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.console import RenderableType
from rich.text import Text

import rankwise as rw
from rankwise.analysis.scanning import MEASURES, Scan, ordinary
from rankwise.cli.inspection import empty_table, shown
from rankwise.errors import BaseMismatch
from rankwise.train.model.merged import base_of
from rankwise.train.model.pretrained import BUILT_IN
from rankwise.train.model.skeleton import locate_files

_LISTED = 40


def scanned(adapter: Path, base: str | None) -> tuple[Scan, Path | None]:
    """The scan, and the base that it was measured against: the one given, or named in the adapter if it lies here.

    Raises:
        PretrainedError: the one given is not there. What ``rankwise.read`` raises.
    """
    named = base if base is not None else _here(adapter)
    files = None if named is None else locate_files(named)
    return rw.analysis.scan(rw.read(adapter), files), files


def _here(adapter: Path) -> str | None:
    """The base that an adapter names, but none that would have to be fetched: the name may be a stranger's."""
    try:
        name = base_of(adapter)
    except BaseMismatch:
        return None
    return name if name in BUILT_IN or Path(name).is_dir() else None


def report(scan: Scan, base: Path | None) -> Iterator[RenderableType]:
    """What was measured, beside what is ordinary, and what stands out."""
    yield _measures(scan)
    if base is None:
        yield Text.assemble(("note ", "bold"), "no base was looked at: name one that is here with --base")
    if not scan.findings:
        yield Text("Nothing stands out beside ordinary adapters.", style="green")
        return
    findings = empty_table("What stands out")
    for name in ("layer", "what", "why", "what to do"):
        findings.add_column(name, overflow="fold")
    for finding in scan.findings[:_LISTED]:
        findings.add_row(shown(finding.site or "all"), finding.what, shown(finding.why), finding.advice)
    yield findings
    if scan.findings[_LISTED:]:
        yield Text(f"and {len(scan.findings) - _LISTED} more, in --json")


def _measures(scan: Scan) -> RenderableType:
    measures = empty_table("Beside ordinary adapters")
    for name in ("measure", "what it is", "lowest", "median", "highest", "ordinary"):
        measures.add_column(name, justify="left" if name in ("measure", "what it is") else "right", overflow="fold")
    for measure, (formula, _) in MEASURES.items():
        values = [site[measure] for site in scan.sites.values() if measure in site]
        if values:
            low, high = ordinary()[measure]
            numbers = (f"{value:.3g}" for value in (min(values), median(values), max(values)))
            measures.add_row(measure, formula, *numbers, f"{low:.2g} – {high:.2g}")
    if scan.fit is not None:
        lowest = ordinary()["fit"][0]
        measures.add_row("fit", "to the base; 1 by chance", "", f"{scan.fit:.3g}", "", f"from {lowest:.2g} on")
    return measures
