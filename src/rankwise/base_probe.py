"""The probe of a base model in an adapter's file: a few of its weights, by which another base is recognised."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import BrokenFile

PROBED = 16  # weights of each module that is probed


def read_probes(where: Path, content: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The probes that :func:`rankwise.adapter.base_probes` made, out of a file.

    Raises:
        BrokenFile: they are anything else.
    """
    found = content.get("base_probe", {})
    sound = isinstance(found, dict) and all(
        isinstance(values, list)
        and len(values) == PROBED
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        for values in found.values()
    )
    if not sound:
        raise BrokenFile(
            f"{where}: expected {PROBED} finite numbers for each module under base_probe; delete the file or save anew"
        )
    return {path: tuple(map(float, values)) for path, values in found.items()}
