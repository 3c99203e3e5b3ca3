"""An earlier run that a page shows beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import RecipeError
from rankwise.files import read_limited
from rankwise.json_object import as_json
from rankwise.report.history import History, points
from rankwise.train.trainer.run_log import LOG


@dataclass(frozen=True)
class EarlierRun:
    """What an earlier run logged, and the name of its directory."""

    name: str
    history: History

    def compared(self, metrics: Mapping[str, Any]) -> list[str]:
        """What the page says of both held-out losses; nothing where one of the runs has none."""
        losses, after = points(self.history, "eval_loss")[1], metrics["eval_loss_after"]
        if not losses or after is None:
            return []
        difference = after - losses[-1]
        way = f"{abs(difference):.3f} {'higher' if difference > 0 else 'lower'} than" if difference else "the same as"
        return [f"The loss is {way} that of {self.name} ({losses[-1]:.3f}), if both held out the same samples."]


def earlier_run(directory: str) -> EarlierRun:
    """The run in a directory.

    Raises:
        RecipeError: it has no log that can be read.
    """
    path = Path(directory) / LOG
    if not path.is_file():
        raise RecipeError(f"`beside`: {directory}: expected the directory of a run, with {LOG} in it, found none")
    rows = [as_json(f"{path}, line {n}", line) for n, line in enumerate(read_limited(path).splitlines(), 1)]
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise RecipeError(f"`beside`: {path}: expected a line for each logged step, found others: was it edited?")
    return EarlierRun(Path(directory).resolve().name, rows)
