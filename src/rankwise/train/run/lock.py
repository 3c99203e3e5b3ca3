"""One writer per run directory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from rankwise.disk import write_json, writing
from rankwise.errors import CheckpointError, RunLocked
from rankwise.files import read_json

_LOCK = ".run.lock"
_HOLDER = "run-holder.json"
_PATIENCE = 0.3  # seconds: of processes that start together, all but one look first and hold it for a moment


@contextmanager
def only_writer(run_dir: str | Path, console: Console) -> Iterator[None]:
    """Hold a run directory; another process that asks for it is refused, and told who has it.

    The operating system holds the lock, so it ends with its process, however that ends; the file beside it says who has
    it. What a dead process of this machine left is taken over with a notice. A file system that another machine shares
    may not pass its locks on, so there its file counts.

    Raises:
        RunLocked: another process has it. WriteError: the system refuses.
    """
    folder = Path(run_dir)
    with _locked(folder):
        _take_over(folder, console)
        write_json(folder / _HOLDER, _me())
        try:
            yield
        finally:
            (folder / _HOLDER).unlink(missing_ok=True)


def check_free(run_dir: str | Path) -> None:
    """Refuse a run directory that another process writes to, before anything costly is done.

    Raises:
        RunLocked: another process has it.
    """
    folder = Path(run_dir)
    if (folder / _HOLDER).exists():
        with _locked(folder):
            _check_this_machine(folder)


def forget(run_dir: str | Path) -> None:
    """Drop what says who has a directory: a process, maybe of another machine, that is known to have ended."""
    (Path(run_dir) / _HOLDER).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / _LOCK, timeout=_PATIENCE)
    with writing(folder / _LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            for _ in range(20):
                if _holder(folder):
                    break
                time.sleep(0.1)  # it has only just begun
            raise RunLocked(_refusal(folder, "wait for it, or end it and start again")) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            (folder / _LOCK).unlink()  # held, so that nobody is given a lock on a file that is no longer there
        lock.release()


def _take_over(folder: Path, console: Console) -> None:
    _check_this_machine(folder)
    if (folder / _HOLDER).exists():
        console.print(
            f"{folder}: was left locked by {_described(_holder(folder))}, which no longer runs; going on",
            style="yellow",
        )


def _check_this_machine(folder: Path) -> None:
    host = _holder(folder).get("host")
    if host not in (None, platform.node()):
        raise RunLocked(_refusal(folder, f"if that machine no longer runs it, remove {folder / _HOLDER}"))


def _refusal(folder: Path, remedy: str) -> str:
    return (
        f"{folder}: expected to be its only writer, found it in use by {_described(_holder(folder))}. Give this run "
        f"another output_dir; {remedy}."
    )


def _me() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(folder: Path) -> dict[str, Any]:
    """Who has the lock, as far as its file can be read: it may be going away at this moment."""
    try:
        return read_json(folder / _HOLDER)
    except CheckpointError:
        return {}


def _described(holder: dict[str, Any]) -> str:
    pid, host, started = (holder.get(key, "unknown") for key in ("pid", "host", "started"))
    return f"process {pid} on {host} (since {started})"
