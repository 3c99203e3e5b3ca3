"""Checkpoint directories: there whole or not at all, and known to be whole when they are read.

A checkpoint is written to ``.partial/checkpoint-N``, every file of it is flushed to disk, ``manifest.json`` with the
size and SHA-256 of each comes last, and one rename makes it ``checkpoint-N``. Whatever stops the writer, at any moment,
leaves the checkpoints before it as they were.

There is one writer at a time (the caller holds the run's lock), so what lies in ``.partial`` was left by a dead one.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from rankwise.disk import flush_directory, flush_file, remove, write_json, writing
from rankwise.errors import BrokenFile, CheckpointError
from rankwise.files import read_json, readable
from rankwise.train.trainer.contents import check_contents, steps_done

MANIFEST = "manifest.json"
PARTIAL = ".partial"
EARLIER = "earlier"
_REMOVED = ".removed"
_CHUNK = 2**20
_READ = (".json", ".pt", ".pth", ".safetensors")
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


def name_of(step: int) -> str:
    """``checkpoint-N``, as transformers names them."""
    return f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """N of ``checkpoint-N``."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Every ``checkpoint-N`` directory of a run, sound or not, the newest first."""
    with readable(Path(run_dir)):
        directories = [path for path in Path(run_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
        return sorted((path for path in directories if path.is_dir()), key=step_of)[::-1]


def begin(run_dir: str | Path, step: int) -> Path:
    """An empty directory to fill, which :func:`publish` makes ``checkpoint-N``."""
    partial = Path(run_dir) / PARTIAL / name_of(step)
    remove(partial)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, facts: Mapping[str, Any]) -> Path:
    """Flush what was filled in, write the manifest, rename into place.

    Args:
        facts: kept in the manifest: what decides whether a resume is exact.

    Returns:
        The checkpoint.
    """
    run_dir = partial.parent.parent
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    entries = {path.relative_to(partial).as_posix(): _flushed_entry(path) for path in files}
    content = {"files": entries, "facts": dict(facts)}
    write_json(partial / MANIFEST, content | {"sha256": _digest(content)})
    for directory in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        flush_directory(directory)
    target = run_dir / partial.name
    if os.path.lexists(target):
        set_aside(run_dir, [target])
    partial.rename(target)
    partial.parent.rmdir()
    flush_directory(run_dir)
    return target


def check_directory(checkpoint: str | Path) -> dict[str, Any]:
    """Read every file of a checkpoint and compare it with the manifest.

    Returns:
        The facts that the manifest keeps.

    Raises:
        BrokenFile: a file is missing, cannot be read, has another size or other content, or there is no sound manifest.
        UnsafeFile: the manifest is a link out of the directory.
    """
    folder = Path(checkpoint)
    with readable(folder):
        return _checked(folder)


def _checked(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise BrokenFile(f"{folder}: no such directory; expected a checkpoint of the run to resume")
    if not (folder / MANIFEST).is_file():
        raise BrokenFile(
            f"{folder}: expected a {MANIFEST}, which is written last, found none: it was not written whole, or not by "
            "this version. Resume from another checkpoint, or start anew from its adapter"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.pop("sha256", None) != _digest(manifest) or manifest.keys() != {"files", "facts"}:
        raise BrokenFile(f"{folder / MANIFEST}: expected the SHA-256 of its own content in it: it was changed")
    files, facts = manifest["files"], manifest["facts"]
    if not isinstance(files, dict) or not isinstance(facts, dict):
        raise BrokenFile(f"{folder / MANIFEST}: expected an object of files and one of facts")
    for name, expected in files.items():
        if not _is_entry(name, expected):
            raise BrokenFile(f"{folder / MANIFEST}: {name!r}: expected a file in it, with size and SHA-256")
        _check_file(folder, name, expected)
    unlisted = {path.name for path in folder.iterdir() if path.suffix in _READ} - files.keys() - {MANIFEST}
    if unlisted:
        raise BrokenFile(
            f"{folder / min(unlisted)}: expected in {MANIFEST}, not found there, so it was not saved with it"
        )
    return facts


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint that was checked keeps beside the files."""
    facts: dict[str, Any] = read_json(checkpoint / MANIFEST)["facts"]
    return facts


def _is_entry(name: str, entry: Any) -> bool:
    path = PurePosixPath(name)
    inside = name != "" and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return inside and isinstance(entry, dict) and entry.keys() == {"size", "sha256"}


def newest_valid(run_dir: str | Path) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint that can be resumed from, and what is wrong with each newer one. Nothing is changed."""
    broken: list[CheckpointError] = []
    for checkpoint in checkpoints(run_dir):
        try:
            _check_numbered(checkpoint)
        except CheckpointError as error:
            broken.append(error)
        else:
            return checkpoint, broken
    return None, broken


def is_valid(checkpoint: Path) -> bool:
    """Whether a run could resume from it."""
    try:
        _check_numbered(checkpoint)
    except CheckpointError:
        return False
    return True


def _check_numbered(checkpoint: Path) -> None:
    check_directory(checkpoint)
    check_contents(checkpoint)
    if steps_done(checkpoint) != step_of(checkpoint):
        raise BrokenFile(f"{checkpoint}: expected what was saved after that step, found step {steps_done(checkpoint)}")


def clear_leftovers(run_dir: str | Path) -> None:
    """Remove what a dead writer left half-written or half-removed; call it holding the run's lock."""
    for leftover in (Path(run_dir) / PARTIAL, Path(run_dir) / _REMOVED):
        remove(leftover)


def keep_newest(run_dir: str | Path, limit: int) -> None:
    """Remove the older of the valid checkpoints until ``limit`` are left, at least one.

    Broken ones are neither counted nor removed.
    """
    valid = (checkpoint for checkpoint in checkpoints(run_dir) if is_valid(checkpoint))
    for checkpoint in list(valid)[max(limit, 1) :]:
        removed = Path(run_dir) / _REMOVED
        removed.mkdir(exist_ok=True)
        # A rename first: a half-removed checkpoint must not stand among the whole ones.
        checkpoint.rename(removed / checkpoint.name)
        shutil.rmtree(removed)


def set_aside(run_dir: str | Path, later: list[Path]) -> Path:
    """Move checkpoints out of the way into a new ``earlier-N/``; nothing of them is lost. Returns where."""
    places = (Path(run_dir) / f"{EARLIER}-{number}" for number in count(1))
    folder = next(path for path in places if not os.path.lexists(path))
    with writing(folder):
        folder.mkdir()
        for checkpoint in later:
            checkpoint.rename(folder / checkpoint.name)
        flush_directory(folder)
    return folder


def _flushed_entry(path: Path) -> dict[str, Any]:
    flush_file(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise BrokenFile(
            f"{folder}: cannot resume exactly, {name} not found there. Resume from another checkpoint, or start anew "
            "from its adapter"
        )
    size = path.stat().st_size
    if size != expected["size"]:
        raise BrokenFile(f"{path}: expected {expected['size']} bytes, found {size}: it was cut or overwritten")
    digest = _sha256(path)
    if digest != expected["sha256"]:
        raise BrokenFile(f"{path}: expected SHA-256 {expected['sha256']}, found {digest}: its content was changed")
