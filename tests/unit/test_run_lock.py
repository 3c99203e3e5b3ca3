"""One writer per run directory, whatever lies in it."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rankwise.errors import RunLocked, WriteError
from rankwise.train.run.lock import check_free, only_writer

SILENT = Console(quiet=True)
STARTS = 20


def start(folder: Path, ready: int, end: int) -> str:
    """What becomes of a start: it looks first, as a run does, and a winner writes until the end."""
    os.read(ready, 1)  # all at once: the pipe is closed
    try:
        check_free(folder)
        with only_writer(folder, SILENT):
            os.read(end, 1)
            return "won"
    except RunLocked as error:
        return str(error)


@pytest.mark.parametrize("left", [False, True], ids=["a new directory", "left by a killed run"])
def test_of_twenty_starts_at_once_one_wins_and_the_others_are_told_who(tmp_path: Path, left: bool) -> None:
    folder = tmp_path / "run"
    if left:
        folder.mkdir()
        holder = {"pid": 7, "host": os.uname().nodename, "started": "2026-01-01"}
        (folder / "run-holder.json").write_text(json.dumps(holder))
    (ready, go), (end, stop), (told, tell) = os.pipe(), os.pipe(), os.pipe()
    children = {}
    for _ in range(STARTS):
        child = os.fork()
        if not child:
            try:
                os.close(go)
                os.close(stop)
                outcome = start(folder, ready, end)
                os.write(tell, b"x")
                (tmp_path / f"{os.getpid()}.txt").write_text(outcome)
            finally:
                os._exit(0)
        children[child] = tmp_path / f"{child}.txt"
    os.close(go)
    refused = 0
    while refused < STARTS - 1:
        refused += len(os.read(told, STARTS))
    os.close(stop)
    for child in children:
        os.waitpid(child, 0)
    outcomes = [path.read_text() for path in children.values()]
    assert outcomes.count("won") == 1
    (winner,) = (child for child, path in children.items() if path.read_text() == "won")
    named = re.compile(rf"run: expected to be its only writer, found it in use by process {winner} on .* \(since 20")
    assert [outcome for outcome in outcomes if outcome != "won" and not named.search(outcome)] == []
    assert list(folder.iterdir()) == []


def directory(path: Path) -> None:
    path.mkdir()


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


def link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere" / "at all")


@pytest.mark.parametrize(
    "spoil",
    [text(""), text("{"), text("[1]"), text("[" * 100_000), text("\\xff"), text('{"pid": [], "started": {}}'), link],
)
def test_a_record_of_the_holder_that_is_none_counts_for_nothing(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "run-holder.json")
    check_free(tmp_path)
    with only_writer(tmp_path, SILENT):
        assert json.loads((tmp_path / "run-holder.json").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".run.lock", "run-holder.json"])
def test_a_directory_in_the_place_of_the_lock_or_its_record_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(WriteError, match=rf"{re.escape(name)}: could not be written"), only_writer(tmp_path, SILENT):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "mine").write_text("mine")
    (folder / ".run.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(WriteError, match=r"run.lock: could not be written"), only_writer(folder, SILENT):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
