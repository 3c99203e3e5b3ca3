"""What a page says of an adapter's directory and of samples, for a run's own page and for `rankwise analyze`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rankwise.adapter import Adapter
from rankwise.analysis import Alignment
from rankwise.inspection.inspection import inspect
from rankwise.methods import name_of
from rankwise.report.measure import SiteMeasures
from rankwise.report.page import AdapterPart
from rankwise.scaling import SCALINGS
from rankwise.spec import LoRA
from rankwise.train.model.generation import Sample
from rankwise.variants.dora import MAGNITUDE

# Optimizer → site → how the next step agrees with full fine-tuning's.
Measured = Mapping[str, Mapping[str, Alignment]]


def adapter_part(
    name: str, directory: Path, spec: LoRA, sites: Sequence[SiteMeasures], alignment: Measured | None = None
) -> AdapterPart:
    """An adapter's part of the page."""
    inspection = inspect(directory)
    facts = {
        "directory": str(directory),
        "base model": inspection.base_model or "not named",
        "sites": str(len(inspection.sites)),
        "rank": ", ".join(str(rank) for rank in sorted({site.rank for site in inspection.sites})),
        "scaling": name_of(SCALINGS, spec.scaling),
        "parameters": f"{inspection.parameters:,} ({', '.join(inspection.dtypes)})",
        "replaces whole": ", ".join(inspection.replaced) or "nothing",
    }
    engines = [(verdict.engine, verdict.answer, verdict.reason) for verdict in inspection.engines]
    files = {file.name: file.sha256 for file in inspection.files if file.sha256 is not None}
    return AdapterPart(name, facts, sites, engines, files, alignment or {})


def low_rank_part_only(adapter: Adapter) -> list[str]:
    """A note where the low-rank pair is not all of the change."""
    if not any(MAGNITUDE in site.extra for site in adapter.sites.values()):
        return []
    return ["DoRA: all figures are of the low-rank part s·BA; the trained magnitudes change the weights beyond it."]


def texts(sample: Sample) -> tuple[str, str, str, str]:
    """A sample as the page takes it."""
    return (sample.prompt.strip(), sample.before, sample.after, (sample.reference or "").strip())


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {name: version(name) for name in ("rankwise", "torch", "transformers")}
