"""Outcomes of runs on disk, so that what compares runs goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from rankwise.disk import write_file
from rankwise.errors import BrokenFile, Diverged
from rankwise.files import check_directory_name, sha256
from rankwise.train.recipe import Recipe

T = TypeVar("T")
Plain = Mapping[str, Any]


class Records:
    """Runs in directories of their own under ``directory``, named by what decides their outcomes."""

    def __init__(self, directory: Path) -> None:
        check_directory_name(directory)
        self.directory = directory

    def once(self, decided_by: Plain, train: Callable[[Path], Plain], read: Callable[[Plain, Path], T]) -> T:
        """The outcome on file, or that of ``train`` now. Several processes may share the directory.

        Args:
            decided_by: everything that decides the outcome, as plain data.
            train: run's directory → outcome as plain data. Where it raises, nothing is kept; but for Diverged, which
                is an outcome too.
            read: outcome and run's directory → what is returned.

        Raises:
            Diverged: the run did, now or when it was done. BrokenFile: a record that cannot be read.
        """
        key = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]
        directory = self.directory / "runs" / key
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "outcome.json"
        with FileLock(directory / ".lock"):
            if not path.is_file():
                outcome = _outcome(train, directory)
                write_file(path, (json.dumps({**outcome, "run": decided_by}, indent=2) + "\n").encode())
        return _read(path, read)


def _outcome(train: Callable[[Path], Plain], directory: Path) -> Plain:
    try:
        return train(directory)
    except Diverged as error:
        return {"diverged": str(error)}


def _read(path: Path, read: Callable[[Plain, Path], T]) -> T:
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        if "diverged" in outcome:
            raise Diverged(outcome["diverged"])
        return read(outcome, path.parent)
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenFile(
            f"{path}: expected a run's outcome, found: {error!r}; delete its directory to run it anew"
        ) from None


def deciding(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe, of the files that it names, and of rankwise decides a run's outcome."""
    fields = recipe.model_dump(mode="json", exclude={"output_dir"}, exclude_defaults=True)
    return {**fields, **_on_disk(recipe), "rankwise": version("rankwise")}


def _on_disk(recipe: Recipe) -> dict[str, str]:
    """What the recipe's paths hold now: a file's content, a model directory's files with size and time."""
    contents = {}
    for field in ("model", "data", "eval_data"):
        path = Path(getattr(recipe, field) or "")
        if path.is_file():
            contents[f"{field} is"] = sha256(path)
        elif getattr(recipe, field) and path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            contents[f"{field} is"] = " ".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
    return contents
