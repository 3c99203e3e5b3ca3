"""Power loss at any moment, as tests/power_loss.py imagines it: what is read afterwards is old, new, or refused."""

from pathlib import Path
from typing import Any

import pytest
import small_checkpoint
import torch
from peft import PeftModel
from power_loss import after_power_loss
from small_checkpoint import write
from torch import nn
from zoo import perturb

import rankwise as rw
from rankwise.disk import whole_directory
from rankwise.train.trainer.checkpoints import check_directory, keep_newest, newest_valid


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def adapted(seed: int, **spec: Any) -> nn.Module:
    adapted = rw.attach(model(), rw.LoRA(**{"rank": 2, "alpha": 4, "seed": seed} | spec))
    torch.manual_seed(seed)
    perturb(adapted, 0.3)
    return adapted


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(folder: Path) -> torch.Tensor:
    return rw.load(model(), folder)(X)


@torch.no_grad()
def pefts_outputs(folder: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(model(), folder)(X)


@pytest.mark.parametrize(
    "changes",
    [
        {},  # the tensors alone change, by one rename
        {"alpha": 64},
        {"rank": 3, "scaling": "rslora", "target_modules": ["0"]},
        {"variant": "dora"},
        {"variant": "bottleneck"},
    ],
)
def test_an_adapter_saved_over_another(tmp_path: Path, changes: dict[str, Any]) -> None:
    root = tmp_path / "adapter"
    old, new = adapted(0), adapted(0 if not changes else 1, **changes)
    perturb(new, 0.4)
    rw.save(new, tmp_path / "new")
    rw.save(old, root)
    (root / "notes.txt").write_text("mine")
    expected = {"old": outputs(root), "new": outputs(tmp_path / "new")}
    assert not torch.allclose(*expected.values())
    found = set()
    for folder in after_power_loss(root, lambda: rw.save(new, root), tmp_path / "after"):
        config = folder / "adapter_config.json"
        if config.exists() and "RANKWISE" not in config.read_text():
            torch.testing.assert_close(pefts_outputs(folder), outputs(folder))
        y = outputs(folder)
        same = [name for name, value in expected.items() if torch.equal(y, value)]
        assert same, "neither the old adapter nor the new one"
        found.update(same)
        assert (folder / "notes.txt").read_text() == "mine"
    assert found == {"old", "new"}
    assert sorted(path.name for path in root.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_that_switches_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    root = tmp_path / "run"
    root.mkdir()

    def fill(content: str) -> None:
        with whole_directory(root / "adapter") as folder:
            (folder / "sub").mkdir()
            for name in ("a.txt", "sub/b.txt"):
                (folder / name).write_text(content * 100)

    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    fill("old")
    found = set()
    for folder in after_power_loss(root, lambda: fill("new"), tmp_path / "after"):
        adapter = folder / "adapter"
        if not adapter.exists():
            found.add("absent")
            continue
        contents = {(adapter / name).read_text() for name in ("a.txt", "sub/b.txt")}
        assert contents in ({"old" * 100}, {"new" * 100})
        found |= {content[:3] for content in contents}
    assert found == {"old", "new"} if exchange else {"old", "new", "absent"}
    assert [path.name for path in root.iterdir()] == ["adapter"]


@pytest.mark.parametrize("limit", [None, 1])
def test_a_checkpoint(tmp_path: Path, limit: int | None) -> None:
    root, expected = tmp_path / "run", tmp_path / "expected"
    for step in (1, 2):
        write(root, step)
    for step in (1, 2, 3):
        write(expected, step)
    found = set()

    def next_one() -> None:
        write(root, 3)
        if limit is not None:
            keep_newest(root, limit)

    for folder in after_power_loss(root, next_one, tmp_path / "after", subsets=3):
        newest, broken = newest_valid(folder)
        assert newest is not None
        assert not broken
        step = check_directory(newest)["seed"]
        assert newest.name == f"checkpoint-{step}"
        for name in small_checkpoint.FILES:
            assert (newest / name).read_bytes() == (expected / f"checkpoint-{step}" / name).read_bytes()
        found.add(step)
    assert found == {2, 3}
