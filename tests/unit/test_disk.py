"""Writing files: whole or not at all, nothing left over, and what the system refuses is named."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resaves import adapted, base

import rankwise as rw
from rankwise.disk import settle, staging, whole_directory, write_file, write_files, writing
from rankwise.errors import BrokenFile, WriteError
from rankwise.files import settled


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forked(action: Callable[[], object]) -> None:
    """Do something in a child that is killed when it asks for that."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_dead_processes_left_goes_with_the_next_write_and_what_live_ones_have_stays(tmp_path: Path) -> None:
    write_file(tmp_path / "page.html", b"old")

    def killed() -> None:
        with staging(tmp_path, "page.html") as stage:
            (stage / "page.html").write_bytes(b"half")
            die()

    forked(killed)
    assert len(list(tmp_path.glob(".page.html.*"))) == 1
    with staging(tmp_path, "page.html") as live:
        write_file(tmp_path / "page.html", b"new")
        assert [path.name for path in tmp_path.glob(".*")] == [live.name]
    assert everything(tmp_path) == {"page.html": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_dead_process_directory_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("a", "b.old", "b"):
        (tmp_path / "elsewhere" / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".b.12345678").symlink_to(tmp_path / "elsewhere")
    assert not settle(tmp_path / "folder", "b")
    assert sorted(everything(tmp_path / "elsewhere")) == ["a", "b", "b.old"]
    assert everything(tmp_path / "folder") == {}


def test_what_is_there_already_is_not_written_and_one_change_never_takes_the_last_file_away(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"1", "b": b"2", "last": b"3"}, "last")
    before = {name: (tmp_path / name).stat().st_ino for name in "ab"} | {"last": (tmp_path / "last").stat().st_ino}
    write_files(tmp_path, {"a": b"1", "b": b"4", "last": b"3"}, "last")
    assert everything(tmp_path) == {"a": b"1", "b": b"4", "last": b"3"}
    after = {name: (tmp_path / name).stat().st_ino for name in before}
    assert [name for name in before if before[name] != after[name]] == ["b"]


def test_several_writers_take_turns(tmp_path: Path) -> None:
    """Eight processes save sets of three files over each other: what is there in the end is one of the sets."""
    names = ("a", "b", "last")
    for round in range(3):
        children = []
        for number in range(8):
            child = os.fork()
            if not child:
                try:
                    for repeat in range(5):
                        content = f"{round}-{number}-{repeat}".encode()
                        write_files(tmp_path, dict.fromkeys(names, content), "last")
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        left = everything(tmp_path)
        assert sorted(left) == sorted(names)
        assert len(set(left.values())) == 1


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("spec", [rw.LoRA(rank=2), rw.LoRA(rank=3, alpha=64)], ids=["tensors alone", "all"])
def test_a_disk_that_fails_at_any_moment_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, spec: rw.LoRA
) -> None:
    """Full from some operation on, or failing once: the old adapter or the new one, whole, and a named error."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    old, new = adapted(0, rw.LoRA(rank=2)), adapted(1, spec)
    rw.save(old, tmp_path / "kept")
    real, folder = getattr(os, operation), tmp_path / "adapter"
    expected = [model(x) for model in (old, new)]
    for for_ever in (False, True):
        for failing in range(30):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "kept", folder)
            done = 0

            def fail(*arguments: Any, failing: int = failing, for_ever: bool = for_ever, **options: Any) -> Any:
                nonlocal done
                done += 1
                if done - 1 == failing or (for_ever and done > failing):
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*arguments, **options)

            monkeypatch.setattr(os, operation, fail)
            try:
                rw.save(new, folder)
            except WriteError as error:
                assert f"{folder / 'adapter_config.json'}: could not be written ([Errno 28] No space" in str(error)
                through = False
            else:
                through = True
            monkeypatch.undo()
            y = rw.load(base(), folder)(x)
            assert any(torch.allclose(y, value, atol=1e-3) for value in expected)
            assert sorted(everything(folder)) == ["adapter_config.json", "adapter_model.safetensors", "rankwise.json"]
            if through:
                break
        else:
            raise AssertionError("it never got through")
        assert failing >= 1


def test_a_directory_with_files_of_somebody_else_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for content in ("old", "new", "newest"):
        with whole_directory(target) as folder:
            (folder / "a.txt").write_text(content)
        if content == "new":
            (target / "notes.txt").write_text("mine")
    assert everything(tmp_path) == {
        "adapter/a.txt": b"newest",
        "adapter.earlier-1/a.txt": b"new",
        "adapter.earlier-1/notes.txt": b"mine",
    }


def test_a_directory_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "adapter").symlink_to(tmp_path / "far", target_is_directory=True)
    with whole_directory(tmp_path / "adapter") as folder:
        (folder / "a.txt").write_text("new")
    assert (tmp_path / "adapter").is_symlink()
    assert everything(tmp_path / "far") == {"a.txt": b"new"}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_that_cannot_be_filled_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    with whole_directory(tmp_path / "adapter") as folder:
        (folder / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "adapter") as folder:
        (folder / "a.txt").write_text("new")
        raise KeyboardInterrupt
    assert everything(tmp_path) == {"adapter/a.txt": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_file_where_a_directory_is_to_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match=r"file/adapter_config.json: could not be written \(.*see to its rights"):
        rw.save(adapted(0, rw.LoRA(rank=2)), tmp_path / "file")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(WriteError, match=r"page.html: could not be written"):
        write_file(tmp_path / "page.html", b"page")
    assert everything(tmp_path) == {"file": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "page.html"]


def test_what_libraries_say_of_a_full_disk_is_named_and_nothing_else(tmp_path: Path) -> None:
    named = r"out: could not be written \(No space left on device \(os error 28\)\)"
    with pytest.raises(WriteError, match=named), writing(tmp_path / "out"):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(ValueError, match="a mistake"), writing(tmp_path / "out"):
        raise ValueError("a mistake")


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError, BrokenFile])
def test_what_a_reader_raises_of_files_that_change_is_no_answer(tmp_path: Path, kind: type[Exception]) -> None:
    (tmp_path / "a").write_text("old")

    def read() -> str:
        content = (tmp_path / "a").read_text()
        if content == "old":
            write_files(tmp_path, {"a": b"new"}, "a")
            raise kind("torn")
        return content

    assert settled(tmp_path, ["a"], read) == "new"


def test_what_a_reader_raises_of_files_at_rest_is_raised(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def read() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        settled(tmp_path, ["a"], read)
