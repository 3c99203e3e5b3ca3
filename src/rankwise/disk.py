"""Writing files and directories: whole or not at all, on the disk before they count, and nothing left over."""

import ctypes
import errno
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from rankwise.errors import WriteError


def write_file(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to disk, then rename it into place.

    Raises:
        WriteError: see :func:`writing`. What was there is as it was.
    """
    write_files(path.parent, {path.name: content}, path.name)


def write_files(folder: Path, contents: Mapping[str, bytes], last: str) -> None:
    """Write files that belong together; a directory without ``last`` counts for nothing.

    What has its content already is left. One change is one rename. Of several, ``last`` is taken away before the first
    and put in place after the rest, each on disk before the next. Whatever stops the process, or the machine, leaves
    the old files, the new ones, or no ``last`` and all that :func:`settle` needs to go on.

    Raises:
        WriteError: see :func:`writing`. The old files are there, or all of the new ones.
    """
    with staging(folder, last) as stage, _alone(folder):
        changed = [name for name, content in contents.items() if not _holds(folder / name, content)]
        if len(changed) > 1 and last not in changed:
            changed.append(last)
        for name in changed:
            _write_flushed(stage / name, contents[name])
        if len(changed) > 1:
            flush_directory(stage)
            flush_directory(folder)
            _take_away(folder / last, stage / f"{last}.old")
            _put_in_place(stage, folder, last)
        elif changed:
            (stage / changed[0]).replace(folder / changed[0])
            flush_directory(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Have other processes that write files together into a directory wait, so that theirs do not mix with these."""
    handle = _lock(folder.resolve(), wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _put_in_place(stage: Path, folder: Path, last: str) -> None:
    for path in stage.iterdir():
        if path.name not in (last, f"{last}.old"):
            path.replace(folder / path.name)
    try:
        flush_directory(folder)
    finally:  # whole again, whatever the disk says
        (stage / last).replace(folder / last)
    flush_directory(folder)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _take_away(path: Path, aside: Path) -> None:
    """Have a file gone, on disk too, or there as before."""
    if not path.exists():
        return
    path.replace(aside)
    try:
        flush_directory(path.parent)
    except OSError:
        aside.replace(path)
        raise


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of ``target`` as a whole, flushed to disk, when that is done.

    A directory that was there is kept beside it, as ``target.earlier-N``, if it has files that the new one has not.

    Raises:
        WriteError: see :func:`writing`. What was there is as it was.
    """
    target = target.resolve()
    with staging(target.parent, target.name) as stage:
        new = stage / target.name
        new.mkdir()
        yield new
        flush_tree(new)
        if not target.exists():
            new.rename(target)
        elif {path.name for path in target.iterdir()} <= {path.name for path in new.iterdir()}:
            _exchange(new, target)
        else:
            earlier = (target.with_name(f"{target.name}.earlier-{number}") for number in count(1))
            target.rename(next(path for path in earlier if not path.exists()))
            new.rename(target)
        flush_directory(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories, at one stroke where the system can: Linux, on most of its file systems."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError, OSError):
        swapped = False
    else:
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        swapped = rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    if not swapped:
        between = one.with_name(f"{one.name}.old")
        other.rename(between)
        try:
            one.rename(other)
        except OSError:
            between.rename(other)
            raise


@contextmanager
def staging(folder: Path, name: str) -> Iterator[Path]:
    """A new directory ``.name.XXXXXXXX`` in ``folder``, removed at the end with what is left in it.

    Its process locks it. One that nobody locks was left by a process that was killed: see :func:`settle`.

    Raises:
        WriteError: see :func:`writing`.
    """
    with writing(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder, name)
        stage, handle = _locked_directory(folder, name)
        try:
            yield stage
        finally:
            with suppress(OSError):
                _finish(stage, folder, name)
            if handle is not None:
                os.close(handle)


def settle(folder: Path, name: str) -> bool:
    """Finish what a process was killed in the middle of; whether that, or a process at work, calls for another look."""
    settled = [_settle(stage, folder, name) for stage in _stages(folder, name)]
    return any(settled)


def _stages(folder: Path, name: str) -> list[Path]:
    return list(folder.glob(f".{glob.escape(name)}.????????"))


def _locked_directory(folder: Path, name: str) -> tuple[Path, int | None]:
    while True:
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
        stage.chmod(0o755)
        try:
            handle = _lock(stage)
        except (BlockingIOError, FileNotFoundError):  # another process took it for a dead one's in this moment
            continue
        if stage.exists():
            return stage, handle


def _finish(stage: Path, folder: Path, name: str) -> None:
    """Remove a directory of :func:`staging`; if its files were on their way into place, not before they are there."""
    begun = (stage / f"{name}.old").exists() and (stage / name).exists()
    if begun and not (folder / name).exists():
        _put_in_place(stage, folder, name)
    shutil.rmtree(stage)


def _settle(stage: Path, folder: Path, name: str) -> bool:
    """Finish for a dead process; whether one is alive, or that was done."""
    try:
        handle = _lock(stage)
        if handle is None:
            return False
        try:
            _finish(stage, folder, name)
        finally:
            os.close(handle)
    except (BlockingIOError, FileNotFoundError):  # a process is at work, or done
        return True
    except OSError:  # nothing may be written here
        return False
    return True


def _lock(directory: Path, *, wait: bool = False) -> int | None:
    """A handle that locks a directory until it is closed, or its process ends; None where there are no such locks.

    Raises:
        BlockingIOError: another has it, and this one is not to wait.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            return None
        raise
    return handle


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While a file or directory is written, by whichever library.

    Raises:
        WriteError: the system refused: a full disk, rights, a file in the way.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # as libraries written in Rust say it
            raise
        raise WriteError(
            f"{path}: could not be written ({error}). Make room on the disk, see to its rights, or choose another place"
        ) from error


def remove(path: Path) -> None:
    """Remove a directory with all in it, a file, or a link, where there is one.

    Raises:
        WriteError: see :func:`writing`.
    """
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def flush_tree(directory: Path) -> None:
    """Bring every file in a directory, and every name, to disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            flush_file(path)
    for folder in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        flush_directory(folder)


def flush_file(path: Path) -> None:
    """Bring a file's content to disk."""
    with path.open("rb+") as stream:  # Windows flushes only what is open for writing
        os.fsync(stream.fileno())


def flush_directory(directory: Path) -> None:
    """Bring the names in a directory to disk. Windows cannot, and has no need to."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """A JSON file with sorted keys."""
    write_file(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """JSON with sorted keys."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
