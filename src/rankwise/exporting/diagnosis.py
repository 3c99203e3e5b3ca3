"""doctor: what engines would not read right of an adapter as it stands."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from rankwise.errors import BrokenFile, SpecError
from rankwise.exporting.base import base_facts
from rankwise.inspection.engines import ENGINES, verdict
from rankwise.inspection.engines.rules import Case, Engine
from rankwise.inspection.facts import Inspection, Verdict
from rankwise.inspection.inspection import inspect
from rankwise.methods import nearest


def doctor(
    directory: str | Path, engines: str | Sequence[str] = tuple(ENGINES), *, base: nn.Module | None = None
) -> tuple[Verdict, ...]:
    """What each engine would refuse, drop, mis-scale or misread of an adapter, and what an export would do about it.

    Args:
        directory: rankwise's or PEFT's.
        engines: names from ``rankwise.inspection.engines.ENGINES``.
        base: the model that the adapter is for, of which no weights are looked at. Without one, nothing is said of
            layers that an engine has no name for, nor of what follows from a head that is tied to the embedding.

    Raises:
        SpecError: there is no such engine. BrokenFile: no such directory, or one that :func:`rankwise.load` refuses.
    """
    chosen = [engine_named(name) for name in ([engines] if isinstance(engines, str) else engines)]
    case = Case(facts_of(Path(directory)), None if base is None else base_facts(base))
    return tuple(verdict(engine, case) for engine in chosen)


def engine_named(name: str) -> Engine:
    """The engine of a name.

    Raises:
        SpecError: there is none.
    """
    if name not in ENGINES:
        raise SpecError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}{nearest(name.lower(), ENGINES)}")
    return ENGINES[name]


def facts_of(folder: Path) -> Inspection:
    """What is in an adapter's directory that can be loaded.

    Raises:
        BrokenFile: it cannot, or is too large to be looked at.
    """
    facts = inspect(folder)
    if not facts.engines:
        problem = facts.problems[0] if facts.problems else "it is too large to be looked at"
        raise BrokenFile(f"{folder}: expected an adapter that can be loaded: {problem}")
    return facts
