"""Everything that is written outside checkpoints, on a full disk: a named error, and what was there is whole."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.analysis.rank_advice import RankAdvice
from rankwise.errors import RecipeError, WriteError
from rankwise.files import check_directory_name
from rankwise.report.curve import save_loss_curve
from rankwise.report.page import Report, write_page, write_report
from rankwise.train.run.adapter_start import write_rank_pattern

HISTORY = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "loss curve": ("loss.png", lambda path: save_loss_curve({"run": HISTORY}, path, "A run")),
    "a run's page": ("report.html", lambda path: write_report(Report("A run", []), path)),
    "a comparison's or a study's page": ("compare.html", lambda path: write_page(path, "<html>", {"a": 1})),
    "advised ranks": ("rank_pattern.yaml", lambda path: write_rank_pattern(RankAdvice({"a": 4}, 4, 0.5, 4, 0.5), path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file, write = WRITERS[name]
    path = tmp_path / file
    path.write_bytes(b"old")
    (tmp_path / "report.json").write_bytes(b"old numbers")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        WriteError, match=rf"{file}: could not be written \(\[Errno 28\] No space.*Make room on the disk"
    ):
        write(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert (tmp_path / "report.json").read_bytes() == b"old numbers"
    assert not list(tmp_path.glob(".*"))
    write(path)
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_place_that_can_be_no_directory_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    file, link, folder, real = (tmp_path / name for name in ("file", "link", "folder", "real"))
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    real.mkdir()
    folder.symlink_to(real, target_is_directory=True)
    check_directory_name(folder / below)
    check_directory_name(tmp_path / below)
    with pytest.raises(RecipeError, match=rf"found that {file} is a file"):
        check_directory_name(file / below)
    with pytest.raises(RecipeError, match=rf"found that {link} is a link to .*nowhere, which is not there"):
        check_directory_name(link / below)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != real)  # root may write anywhere
    with pytest.raises(RecipeError, match=rf"found that {real} may not be written to: its rights, or its disk, forbid"):
        check_directory_name(real / below)
