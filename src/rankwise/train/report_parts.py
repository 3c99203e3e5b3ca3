"""What a page says of an adapter's directory and of samples, for a run's own page and for `rankwise analyze`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rankwise.adapter import Adapter
from rankwise.analysis import Alignment
from rankwise.report.measure import SiteMeasures
from rankwise.report.page import AdapterPart
from rankwise.train.generation import Sample

# Optimizer → site → how the next step agrees with full fine-tuning's.
Measured = Mapping[str, Mapping[str, Alignment]]


def adapter_part(
    name: str, directory: Path, adapter: Adapter, sites: Sequence[SiteMeasures], alignment: Measured | None = None
) -> AdapterPart:
    """An adapter's part of the page."""
    facts = {
        "directory": str(directory),
        "base model": adapter.base_model or "not named",
        "sites": str(len(adapter.sites)),
        "rank": ", ".join(str(rank) for rank in sorted({site.delta.rank for site in adapter.sites.values()})),
        "scaling": adapter.spec.scaling,
        "trained whole": ", ".join(adapter.spec.modules_to_save) or "nothing",
    }
    paths = sorted(path for path in directory.glob("*") if path.suffix in (".safetensors", ".json"))
    return AdapterPart(name, facts, sites, (), {path.name: _sha256(path) for path in paths}, alignment or {})


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def texts(sample: Sample) -> tuple[str, str, str, str]:
    """A sample as the page takes it."""
    return (sample.prompt.strip(), sample.before, sample.after, (sample.reference or "").strip())


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {name: version(name) for name in ("rankwise", "torch", "transformers")}
