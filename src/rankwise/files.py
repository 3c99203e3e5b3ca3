"""Reading single files that nobody need trust: of sane size, inside their directory, and never a pickle."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rankwise.disk import settle
from rankwise.errors import BrokenFile, RecipeError, UnsafeFile
from rankwise.json_object import as_object
from rankwise.tensor_header import TensorEntry, read_header

T = TypeVar("T")


_STRAY = re.compile("[\0\ud800-\udfff]")  # the second: halves of surrogate pairs, for bytes that are no UTF-8
_PATH_LIMIT, _NAME_LIMIT = 4000, 255


def is_text(value: Any) -> bool:
    """Whether all that a value holds can be written to files and be a file's name."""
    if isinstance(value, Mapping):
        return all(is_text(part) for pair in value.items() for part in pair)
    return (
        all(map(is_text, value)) if isinstance(value, list) else not (isinstance(value, str) and _STRAY.search(value))
    )


def expand_user(path: str) -> str:
    """A path in which ``~`` or ``~name`` at the beginning is that user's home.

    Raises:
        ValueError: there is no such user, or no file can have that name and be written of.
    """
    if _STRAY.search(path) or len(path) > _PATH_LIMIT or max(map(len, path.encode().split(b"/"))) > _NAME_LIMIT:
        raise ValueError(f"a path in UTF-8 of names with at most {_NAME_LIMIT} bytes")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError("a user's home after ~, or ./~ for a name that begins so") from None


def check_directory_name(path: Path) -> None:
    """Refuse a path that is no directory and cannot become one, or that may not be written to.

    Raises:
        RecipeError: it or a parent is a file, a link to nowhere, or may not be written to.
    """
    expected = f"{path}: expected a directory, or a new name for one"
    part = next(part for part in (path, *path.absolute().parents) if os.path.lexists(part))
    if not part.exists():
        raise RecipeError(f"{expected}, found that {part} is a link to {part.readlink()}, which is not there")
    if not part.is_dir():
        raise RecipeError(f"{expected}, found that {part} is a file")
    if not os.access(part, os.W_OK | os.X_OK):
        raise RecipeError(f"{expected}, found that {part} may not be written to: its rights, or its disk, forbid it")


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits: of as many bytes as it says it has, as some never end (in /proc)."""
    digest, left = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as stream:
        while chunk := stream.read(min(left, 2**20)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def settled(folder: Path, names: Sequence[str], read: Callable[[], T]) -> T:
    """What ``read`` makes of files that are saved together, all of one save: it reads anew while they change.

    A save whose process was killed is finished first.

    Args:
        names: of the files, in ``folder``, that which is written last at the end.

    Raises:
        BrokenFile: they were saved anew each time. Whatever ``read`` raises of files at rest.
    """
    for pause in _PAUSES:
        with ExitStack() as stack:
            before = [_identity(stack, folder / name) for name in names]
            between = before[-1] is None and settle(folder, names[-1])
            try:
                result = read()
            except Exception:  # of any kind, as a file may change between a library's own look at it and its reading
                if not between and _are(folder, names, before):
                    raise
            else:
                if not between and _are(folder, names, before):
                    return result
        time.sleep(pause)
    raise BrokenFile(f"{folder}: was saved anew each of the {len(_PAUSES)} times that it was read; read it again later")


def _identity(stack: ExitStack, path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that replaces it. It stays open, so that its number is given to no other."""
    try:
        state = os.fstat(stack.enter_context(path.open("rb")).fileno()) if path.is_file() else None
    except OSError:
        return None
    return None if state is None else (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)


def _are(folder: Path, names: Sequence[str], before: Sequence[tuple[int, ...] | None]) -> bool:
    with ExitStack() as stack:
        return [_identity(stack, folder / name) for name in names] == before


_PAUSES = (0.001, 0.01, 0.05, *[0.1] * 20)  # seconds
JSON_LIMIT = 16 * 2**20  # bytes
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BrokenFile: absent, too large, not UTF-8 JSON, not an object, or with a duplicate key.
        UnsafeFile: a link that leaves the directory.
    """
    if not path.is_file():
        raise BrokenFile(f"{path}: no such file; expected an adapter directory with adapter_config.json in it")
    return as_object(str(path), read_limited(path))


def read_limited(path: Path) -> bytes:
    """A small file's content.

    Raises:
        BrokenFile: absent or too large. UnsafeFile: a link that leaves the directory.
    """
    check_stays_inside(path)
    return read_small(path)


def read_small(path: Path) -> bytes:
    """A small file's content, wherever a link leads.

    Raises:
        BrokenFile: absent, a directory, pipe or device, or too large.
    """
    with readable(path):
        if path.exists() and not path.is_file():
            raise BrokenFile(f"{path}: is no plain file; expected one with text in it")
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise BrokenFile(f"{path}: has {size} bytes; expected at most {JSON_LIMIT}: it is not what its name says")
        return path.read_bytes()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """While a file is read.

    Raises:
        BrokenFile: the system cannot read it.
    """
    try:
        yield
    except OSError as error:
        raise BrokenFile(f"{path}: cannot be read ({error.strerror})") from None


def check_stays_inside(path: Path) -> None:
    """Refuse a link out of its directory, which would open a file of its writer's choice.

    The hub's cache is made of links to ``models--x/blobs``, in ``snapshots/<revision>``, its subfolders and directories
    that were asked for elsewhere: these pass. What is there was fetched from the hub.

    Raises:
        UnsafeFile: as it says.
    """
    folder, target = path.parent.resolve(), path.resolve()
    blobs = target.parent
    is_blob = blobs.name == "blobs" and blobs.parent.name.startswith("models--")
    if not is_blob and not target.is_relative_to(folder):
        raise UnsafeFile(
            f"{path}: is a link to {target}, outside its directory, and is not followed; copy the file there"
        )


def is_pickle(path: Path) -> bool:
    """Whether a file's name says that it is one."""
    return path.suffix in _PICKLES


def tensor_entries(path: Path) -> dict[str, TensorEntry]:
    """What a safetensors file's header says; no tensor is read.

    Raises:
        BrokenFile: absent, truncated or malformed. UnsafeFile: only a pickle is there, or a link out of the directory.
    """
    if not path.is_file():
        pickles = sorted(file.name for file in path.parent.glob("*") if is_pickle(file))
        if pickles:
            raise UnsafeFile(
                f"{path.parent}: holds {pickles[0]}, a pickle, which can run code when opened and is refused; "
                f"expected {path.name}: convert it with safetensors in an environment that you trust"
            )
        raise BrokenFile(f"{path}: no such file")
    check_stays_inside(path)
    with readable(path):
        return read_header(path)
