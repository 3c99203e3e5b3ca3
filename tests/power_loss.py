"""What a disk may hold after the power fails, at any moment of something that writes into a directory.

Data that were not yet flushed (fsync) are lost, cut off, or there; of the names that were made, moved or removed since
the last flush of their directory, any may be lost.
"""

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import rankwise.disk

Name = tuple[int, str]  # inode of the directory, name in it


@dataclass(frozen=True)
class Renaming:
    """Names that change at one stroke: those that go, and those that come, with their inodes."""

    gone: frozenset[Name]
    come: tuple[tuple[Name, int], ...]


@dataclass(frozen=True)
class Flush:
    """An fsync of a file or a directory."""

    inode: int


@dataclass
class Recorder:
    """Everything that happened in a directory, as a list of its changes of names, its flushes, and its contents."""

    root: Path
    events: list[tuple[Renaming | Flush, dict[int, bytes]]] = field(default_factory=list)
    _names: dict[Name, int] = field(default_factory=dict)
    _directories: set[int] = field(default_factory=set)
    _open: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names, self.contents_before = self._scan()
        self.names_before = dict(self._names)

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def look(self, *, at_one_stroke: bool = False) -> None:
        """Note what changed since the last look."""
        names, contents = self._scan()
        gone = {name for name, inode in self._names.items() if names.get(name) != inode}
        come = [(name, inode) for name, inode in names.items() if self._names.get(name) != inode]
        if at_one_stroke:
            changes = [Renaming(frozenset(gone), tuple(come))] if gone or come else []
        else:
            changes = [Renaming(frozenset(), (each,)) for each in come]
            changes += [Renaming(frozenset({name}), ()) for name in gone - {name for name, _ in come}]
        self.events += [(change, contents) for change in changes]
        self._names = names

    def flushed(self, handle: int) -> None:
        self.look()
        self.events.append((Flush(os.fstat(handle).st_ino), self._scan()[1]))

    def _scan(self) -> tuple[dict[Name, int], dict[int, bytes]]:
        names, contents, folders = {}, {}, [self.root]
        for folder in folders:
            here = self._number(folder)
            self._directories.add(here)
            for path in sorted(folder.iterdir()):
                inode = names[here, path.name] = self._number(path)
                if path.is_dir():
                    folders.append(path)
                else:
                    contents[inode] = path.read_bytes()
        return names, contents

    def _number(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._open:  # an open file's number is not given to another
            self._open[inode] = os.open(path, os.O_RDONLY)
        return inode

    def states(self, rng: random.Random, subsets: int) -> Iterator[tuple[dict[Name, int], dict[int, bytes]]]:
        """Every state that the disk may be left in: names and contents."""
        durable, pending = dict(self.names_before), list[Renaming]()
        flushed = dict(self.contents_before)
        contents = dict(self.contents_before)
        for event, now in [(None, contents), *self.events]:
            contents = contents | now
            if isinstance(event, Renaming):
                pending.append(event)
            elif isinstance(event, Flush) and event.inode in self._directories:
                reached = [change for change in pending if _touches(change, event.inode)]
                for change in reached:
                    _apply(durable, change)
                pending = [change for change in pending if change not in reached]
            elif isinstance(event, Flush):
                flushed[event.inode] = contents[event.inode]
            for kept in _subsets(pending, rng, subsets):
                names = dict(durable)
                for change in kept:
                    _apply(names, change)
                for share in (0.0, 0.5, 1.0):
                    yield (
                        names,
                        {inode: _left(flushed.get(inode), content, share) for inode, content in contents.items()},
                    )

    def write(self, state: tuple[dict[Name, int], dict[int, bytes]], folder: Path) -> None:
        """Make a state a real directory."""
        names, contents = state
        shutil.rmtree(folder, ignore_errors=True)
        places = {self.root.stat().st_ino: folder}
        folder.mkdir()
        left = dict(names)
        while ready := [name for name in left if name[0] in places]:
            for name in ready:
                inode, path = left.pop(name), places[name[0]] / name[1]
                if inode in self._directories:
                    path.mkdir()
                    places[inode] = path
                else:
                    path.write_bytes(contents[inode])


def _touches(change: Renaming, directory: int) -> bool:
    return any(name[0] == directory for name in (*(name for name, _ in change.come), *change.gone))


def _apply(names: dict[Name, int], change: Renaming) -> None:
    for name in change.gone:
        names.pop(name, None)
    names.update(change.come)


def _subsets(changes: list[Renaming], rng: random.Random, most: int) -> Iterator[list[Renaming]]:
    if 2 ** len(changes) <= most:
        for size in range(len(changes) + 1):
            yield from (list(kept) for kept in itertools.combinations(changes, size))
        return
    yield changes  # all: the process was killed, and no more
    yield []
    for _ in range(most - 2):
        yield [change for change in changes if rng.random() < 0.5]


def _left(flushed: bytes | None, content: bytes, share: float) -> bytes:
    return content if flushed == content else content[: int(len(content) * share)]


@contextmanager
def recorded(root: Path) -> Iterator[Recorder]:
    """Record what happens in a directory meanwhile."""
    recorder = Recorder(root)
    fsync, exchange = os.fsync, rankwise.disk._exchange

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        recorder.flushed(handle)

    def noted(real: Callable[..., None]) -> Callable[..., None]:
        def rename(*arguments: object, **options: object) -> None:
            recorder.look()
            real(*arguments, **options)
            recorder.look(at_one_stroke=True)

        return rename

    with (
        patch("os.fsync", noted_fsync),
        patch("os.rename", noted(os.rename)),
        patch("os.replace", noted(os.replace)),
        patch("rankwise.disk._exchange", noted(exchange)),
    ):
        yield recorder
    recorder.look()


def after_power_loss(root: Path, action: Callable[[], object], work: Path, subsets: int = 12) -> Iterator[Path]:
    """Do something that writes into ``root``, then give each state, as a directory, that a power loss may leave.

    Of the names that may be lost, at most so many subsets are tried.
    """
    with recorded(root) as recorder:
        action()
    seen = set()
    for state in recorder.states(random.Random(0), subsets):
        key = hash((frozenset(state[0].items()), frozenset(state[1].items())))
        if key not in seen:
            seen.add(key)
            recorder.write(state, work)
            yield work
    recorder.close()
