"""The page: one HTML file with everything in it, and the same numbers as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from rankwise.analysis import Alignment
from rankwise.disk import write_files
from rankwise.errors import RecipeError
from rankwise.files import check_directory_name
from rankwise.report import figures
from rankwise.report.figures import Panel
from rankwise.report.history import History
from rankwise.report.measure import INTRUDERS_AMONG, Similarity, SiteMeasures

FORMAT_VERSION = 1
# Step → optimizer → site → how the next step agrees with full fine-tuning's.
Alignments = Mapping[int, Mapping[str, Mapping[str, Alignment]]]


@dataclass(frozen=True)
class AdapterPart:
    """What the page says of one adapter.

    Attributes:
        facts: label → text.
        engines: (engine, whether it reads the adapter right, why).
        files: name → SHA-256.
        alignment: as it is now; empty where it was not measured.
    """

    name: str
    facts: Mapping[str, str]
    sites: Sequence[SiteMeasures]
    engines: Sequence[tuple[str, str, str]] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    alignment: Mapping[str, Mapping[str, Alignment]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything that a page shows.

    Attributes:
        verdict: the page's first sentences.
        headline: label → the few figures at the top.
        data: label → text: what was trained on.
        runs: name → what its trainer logged.
        over_run: the alignment along the run; empty where it was not measured.
        samples: (prompt, before, after, reference or "").
        configuration: the recipe as YAML, or "".
        notes: lines about how the figures were got.
    """

    title: str
    adapters: Sequence[AdapterPart]
    verdict: Sequence[str] = ()
    headline: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    similarities: Sequence[Similarity] = ()
    runs: Mapping[str, History] = field(default_factory=dict)
    loss_unit: str = "nats per token"
    over_run: Alignments = field(default_factory=dict)
    samples: Sequence[tuple[str, str, str, str]] = ()
    configuration: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def check_place(html: Path) -> None:
    """Refuse a name that a page cannot have, before any work.

    Raises:
        RecipeError: it does not end in .html, is a directory, or lies in what is no directory.
    """
    if html.suffix != ".html" or html.is_dir():
        raise RecipeError(f"{html}: expected a page's name, such as analysis.html; its numbers go beside it as .json")
    check_directory_name(html.parent)


def write_report(report: Report, html: Path) -> Path:
    """Write the page, and its numbers beside it as ``.json``; returns the page's path."""
    return write_page(html, render(report), {"format_version": FORMAT_VERSION, **asdict(report)})


def write_page(html: Path, text: str, numbers: Mapping[str, Any]) -> Path:
    """Write a page and its numbers, no page beside other numbers; returns the page's path.

    Raises:
        WriteError: the system refuses.
    """
    content = json.dumps(finite(numbers), indent=1, ensure_ascii=False) + "\n"
    files = {html.with_suffix(".json").name: content.encode(), html.name: text.encode()}
    write_files(html.parent, files, last=html.name)
    return html


def render(report: Report) -> str:
    """The page as HTML."""
    run_panels = [figures.losses(report.runs, report.loss_unit)] if report.runs else []
    run_panels += figures.training(report.runs)
    if len(report.over_run) > 1:
        run_panels.append(figures.alignment_over_run(report.over_run))
    between = [
        figures.similarity(f"similarity-{i}", similarity)
        for i, similarity in enumerate(report.similarities)
        if similarity.by_module
    ]
    return page(
        report.title,
        verdict=report.verdict,
        headline=report.headline,
        data=report.data,
        sections=[
            ("Training", run_panels),
            *(
                (_section_title(report, part), _adapter_panels(f"adapter-{i}", part))
                for i, part in enumerate(report.adapters)
            ),
            ("Between adapters" if len(report.adapters) > 1 else "Start and end", between),
        ],
        samples=report.samples,
        adapters=report.adapters,
        configuration=report.configuration,
        versions=report.versions,
        notes=report.notes,
    )


def page(title: str, *, sections: Sequence[tuple[str, Sequence[Panel]]], **content: Any) -> str:
    """Any panels as a page: the studies' too."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rankwise.report", "."), undefined=jinja2.StrictUndefined, autoescape=True
    )
    environment.filters["anchor"] = _anchor
    shown = [(heading, panels) for heading, panels in sections if panels]
    defaults: dict[str, Any] = {
        "verdict": (), "headline": {}, "data": {}, "samples": (), "adapters": (),
        "configuration": "", "versions": {}, "notes": (),
    }  # fmt: skip
    content = defaults | content
    contents = [(_anchor(heading), heading) for heading, _ in shown]
    contents += [("samples", "Samples")] if content["samples"] else []
    contents += [("engines", "Engines")] if any(adapter.engines for adapter in content["adapters"]) else []
    contents += [("configuration", "Configuration and files")]
    return environment.get_template("page.html.jinja").render(title=title, sections=shown, contents=contents, **content)


def _anchor(heading: str) -> str:
    """What a link to a section is called."""
    return "-".join(re.findall(r"\w+", heading.lower()))


def _section_title(report: Report, part: AdapterPart) -> str:
    return f"What changed: {part.name}" if len(report.adapters) > 1 else "What changed"


def _adapter_panels(name: str, part: AdapterPart) -> list[Panel]:
    sites = part.sites
    if not sites:  # of an adapter that changes no weight
        return []
    against = [site for site in sites if site.against_base is not None]
    panels = []
    if against:
        panels.append(
            figures.layer_map(
                f"{name}-size",
                "Relative change ‖ΔW‖ / ‖W‖ (Frobenius norms)",
                against,
                lambda site: figures.against_base(site).relative_size,
                "How far each weight moved.",
            )
        )
    panels.append(
        figures.layer_map(
            f"{name}-rank",
            "Effective rank of ΔW (directions)",
            sites,
            lambda site: site.effective_rank,
            "How many directions each change really uses.",
            limits=(0, max(site.rank for site in sites)),
            shown="{:.1f}",
        )
    )
    panels += [
        figures.alignments(f"{name}-alignment-{optimizer}", optimizer, sites, alignment_by_site)
        for optimizer, alignment_by_site in part.alignment.items()
    ]
    panels.append(figures.spectra(f"{name}-spectra", sites))
    if against:
        panels += [figures.amplification_table(against), figures.lost_table(against)]
        if all(figures.against_base(site).intruders is not None for site in against):
            panels.append(figures.intruders_table(against, INTRUDERS_AMONG))
    return panels


def finite(value: Any) -> Any:
    """Plain data for JSON, which has no infinity: None in its place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
