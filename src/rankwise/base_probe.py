"""The probe of a base model in an adapter's file: a few of its weights, by which another base is recognised."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import BrokenFile

PROBED = 16  # weights of each module that is probed


def read_probes(source: Path, content: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The probes that :func:`rankwise.adapter.base_probes` made, out of a file.

    Raises:
        BrokenFile: they are anything else.
    """
    probes = content.get("base_probe", {})
    sound = isinstance(probes, dict) and all(
        isinstance(values, list)
        and len(values) == PROBED
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        for values in probes.values()
    )
    if not sound:
        raise BrokenFile(
            f"{source}: expected {PROBED} finite numbers for each module under base_probe; delete the file or save anew"
        )
    return {path: tuple(map(float, values)) for path, values in probes.items()}


def gap(recorded: Sequence[float], here: Sequence[float]) -> float:
    """‖recorded − here‖ / ‖recorded‖ of two probes of one layer."""
    return math.dist(recorded, here) / max(math.hypot(*recorded), 1e-30)


def room(quantised: bool) -> float:
    """The largest :func:`gap` between probes of one base, with room for rounding to bf16 or 4 bits.

    4 bits move some small layers' few numbers by a third; another base's are off by about 1.4.
    """
    return 0.5 if quantised else 0.02
