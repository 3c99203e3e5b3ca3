"""Checkpoint directories: written whole or not at all, found broken when they are, never lost."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import small_checkpoint
from small_checkpoint import write

from rankwise.errors import BrokenFile
from rankwise.train.trainer.checkpoints import (
    MANIFEST,
    PARTIAL,
    begin,
    check_directory,
    checkpoints,
    clear_leftovers,
    keep_newest,
    newest_valid,
    set_aside,
)

FILES = (*small_checkpoint.FILES, "state/of-a-callback", "empty.txt")


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_found_with_its_facts(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint = write(tmp_path, step)
        assert checkpoint == tmp_path / f"checkpoint-{step}"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert newest_valid(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert check_directory(tmp_path / "checkpoint-9") == {"seed": 9}
    assert not (tmp_path / PARTIAL).exists()
    assert newest_valid(tmp_path / "nowhere") == (None, [])


def test_each_file_cut_at_many_offsets_is_named_and_the_previous_checkpoint_taken(tmp_path: Path) -> None:
    previous, newest = write(tmp_path, 1), write(tmp_path, 2)
    rng, tried = random.Random(0), 0
    whole, older = everything(newest), everything(previous)
    for name, content in whole.items():
        # The last byte of the manifest ends its line; without it nothing is lost.
        last = len(content) - (2 if name == MANIFEST else 1)
        for offset in sorted(
            {0, 1, last, *(rng.randrange(last) for _ in range(40) if last > 0)} & set(range(last + 1))
        ):
            (newest / name).write_bytes(content[:offset])
            found, broken = newest_valid(tmp_path)
            assert found == previous
            (error,) = broken
            assert str(newest / name) in str(error)
            tried += 1
        (newest / name).write_bytes(content)
    assert tried > 150
    assert newest_valid(tmp_path) == (newest, [])
    assert everything(previous) == older


def test_one_changed_bit_is_found_in_any_file(tmp_path: Path) -> None:
    previous, newest = write(tmp_path, 1), write(tmp_path, 2)
    rng = random.Random(0)
    for name, content in everything(newest).items():
        for _ in range(60 if content else 0):
            changed = bytearray(content)
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            try:
                same = json.loads(changed) == json.loads(content)  # white space of the manifest
            except ValueError:
                same = False
            (newest / name).write_bytes(changed)
            assert newest_valid(tmp_path)[0] == (newest if same else previous), name
        (newest / name).write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_each_missing_file_is_named(tmp_path: Path, name: str) -> None:
    checkpoint = write(tmp_path, 1)
    (checkpoint / name).unlink()
    with pytest.raises(BrokenFile, match=f"{checkpoint}.*{name}"):
        check_directory(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected the SHA-256 of its own content"),
        ('{"files": {}, "facts": {}, "sha256": "0"}', "expected the SHA-256 of its own content"),
        ('{"files": {}, "files": {}}', "appears twice"),
        ("version https://git-lfs.github.com/spec/v1", "not valid JSON"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    checkpoint = write(tmp_path, 1)
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(BrokenFile, match=message):
        check_directory(checkpoint)


def test_every_file_is_flushed_before_the_rename_and_the_manifest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        order.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def noted_rename(self: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return rename(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("tells files by /proc")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    write(tmp_path, 1)
    files = [Path(name).name for name in FILES]
    assert sorted(order[: len(files)]) == sorted(files)
    rest = [MANIFEST, "checkpoint-1", "state", "checkpoint-1", "rename to checkpoint-1", tmp_path.name]
    assert order[len(files) :] == rest


@pytest.mark.parametrize("operation", ["fsync", "rename", "replace"])
def test_a_disk_that_fails_at_any_moment_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    older = everything(write(tmp_path, 1))
    owner = os if operation == "fsync" else Path
    real = getattr(owner, operation)
    for failing in range(20):
        count = iter(range(failing, -1, -1))

        def fail(*arguments: object, count=count) -> object:
            if next(count, 0) == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(owner, operation, fail)
        try:
            write(tmp_path, 2)
            through = True
        except OSError:
            through = False
        monkeypatch.undo()
        found, broken = newest_valid(tmp_path)
        assert not broken
        assert found in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
        assert everything(tmp_path / "checkpoint-1") == older
        if through:
            break
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
    else:
        raise AssertionError("it never got through")
    assert failing >= 1


def test_what_a_dead_writer_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    begun = begin(tmp_path, 2)
    (begun / "optimizer.pt").write_bytes(b"half")
    assert newest_valid(tmp_path) == (tmp_path / "checkpoint-1", [])
    assert list(begin(tmp_path, 2).iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "notes.txt"]


def test_the_last_valid_checkpoint_is_never_removed(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    for step in (5, 4, 2):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"cut")
    keep_newest(tmp_path, 1)
    left = [path.name for path in checkpoints(tmp_path)]
    assert left == ["checkpoint-5", "checkpoint-4", "checkpoint-3", "checkpoint-2"]  # 1 went; the broken are kept
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoint-3"
    keep_newest(tmp_path, 0)
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoint-3"


def test_checkpoints_set_aside_are_whole(tmp_path: Path) -> None:
    content = everything(write(tmp_path, 3))
    for number in (1, 2):
        folder = set_aside(tmp_path, [tmp_path / "checkpoint-3"])
        assert folder == tmp_path / f"earlier-{number}"
        assert everything(folder / "checkpoint-3") == content
        write(tmp_path, 3)
