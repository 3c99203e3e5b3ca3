"""`rankwise inspect` and `rankwise doctor`, as tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rankwise.cli.terminal import visible
from rankwise.inspection.engines import REMEDIES
from rankwise.inspection.facts import Inspection, SiteFacts, Verdict

_COLOURS = {"yes": "green", "after export": "yellow", "no": "red"}


def report(inspection: Inspection) -> Iterator[RenderableType]:
    """The whole report, problems last: that is where the eye stays."""
    yield _facts(inspection)
    if inspection.sites:
        yield _sites(inspection)
    yield _files(inspection)
    if inspection.engines:
        yield _engines(inspection)
    for note in inspection.notes:
        yield Text.assemble(("note ", "bold"), shown(note))
    for problem in inspection.problems:
        yield Text.assemble(("problem ", "bold red"), shown(problem))
    if inspection.problems:
        yield Text("rankwise.load refuses this directory.", style="bold red")


def _facts(inspection: Inspection) -> Table:
    table = Table(
        title=shown(inspection.directory), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    spec = inspection.spec or {}
    table.add_row("kind", shown(inspection.peft_type or "unknown"))
    table.add_row("base model", shown(inspection.base_model or "not named"))
    if spec:
        table.add_row("variant", shown(str(spec["variant"])))
        table.add_row("rank, alpha", f"{spec['rank']}, {spec['alpha']:g}, scaling {spec['scaling']}")
        table.add_row("patterns", f"{len(spec['rank_pattern'])} of ranks, {len(spec['alpha_pattern'])} of alpha")
    table.add_row("sites", str(len(inspection.sites)))
    table.add_row("parameters", f"{inspection.parameters:,}")
    table.add_row("dtypes", ", ".join(f"{dtype} ({count:,})" for dtype, count in inspection.dtypes.items()) or "none")
    return table


def _sites(inspection: Inspection) -> Table:
    """Layers that differ in their number only share a line."""
    table = empty_table("Sites")
    table.add_column("layers", overflow="fold")
    for name in ("count", "kind", "out × in", "rank", "scale", "dtype", "‖ΔW‖"):
        table.add_column(name, justify="left" if name in ("kind", "dtype") else "right")
    groups: defaultdict[tuple[str, str, tuple[int, int], int, float, str], list[SiteFacts]] = defaultdict(list)
    for site in inspection.sites:
        place = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.name)
        groups[place, site.kind, site.shape, site.rank, site.scale, site.dtype].append(site)
    for (place, kind, (out, into), rank, scale, dtype), alike in groups.items():
        changes = sorted((f"{site.change:.3g}" for site in alike if site.change is not None), key=float)
        norms = " – ".join(dict.fromkeys((changes[0], changes[-1]))) if changes else ""
        table.add_row(shown(place), str(len(alike)), kind, f"{out} × {into}", str(rank), f"{scale:.4g}", dtype, norms)
    return table


def _files(inspection: Inspection) -> Table:
    table = empty_table("Files")
    table.add_column("name", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("sha256", overflow="fold")
    for file in inspection.files:
        table.add_row(shown(file.name), f"{file.size:,}", file.sha256 or "not opened")
    return table


def _engines(inspection: Inspection) -> Table:
    table = empty_table("Who reads it right, as it stands")
    for name in ("engine", "", "how, or why not"):
        table.add_column(name, overflow="fold")
    for verdict in inspection.engines:
        table.add_row(verdict.engine, Text(verdict.answer, style=_COLOURS[verdict.answer]), verdict.reason)
    return table


def diagnosis(verdicts: Iterable[Verdict]) -> Iterator[RenderableType]:
    """A table for each engine: what it would not read right, where, why, and what an export does about it."""
    for verdict in verdicts:
        if not verdict.findings:
            yield Text.assemble(
                (verdict.engine, "bold"), " reads it right", f": {verdict.reason}" * bool(verdict.reason)
            )
            continue
        table = empty_table(verdict.engine)
        for name in ("", "what", "where", "why", "source", "export"):
            table.add_column(name, overflow="fold")
        for finding in verdict.findings:
            first, more = shown(finding.sites[0]), len(finding.sites) - 1
            where = f"{first} and {more} more" if more else first
            table.add_row(finding.effect, finding.about, where, finding.why, finding.source, REMEDIES[finding.remedy])
        yield table


def empty_table(title: str) -> Table:
    """In the report's style."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def shown(text: str) -> str:
    """Text out of a file, on one line."""
    return visible(text).replace("\n", r"\n")
