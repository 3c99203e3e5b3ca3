"""Runs that are trained together, beside the same runs each alone."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_llama import write_pairs

from rankwise.errors import RecipeError, SpecMismatch
from rankwise.sweep import run_sweep, write_sweep
from rankwise.sweep.arms import arms_of
from rankwise.train import recipe as recipes
from rankwise.train.run import run
from rankwise.train.trainer import checkpoints

SILENT = Console(quiet=True)
ARMS = {
    "plain": {},
    "wide": {"rank": 7, "alpha": 3, "seed": 4},
    "dora": {"variant": "dora", "weight_decay": 0.1, "warmup_steps": 2},
    "ga": {"init": "lora-ga", "learning_rate": 1e-3, "scaling": "rslora", "max_grad_norm": 0.05},
    "spectral": {"optimizer": "spectral", "target_modules": ["q_proj", "down_proj"]},
    "ratio": {"optimizer": {"name": "lora-plus", "ratio": 4}, "lr_scheduler_type": "cosine"},
    "dropout": {"dropout": 0.2, "seed": 9},
}


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    files = tmp_path_factory.mktemp("pairs")
    write_pairs(files / "train.jsonl")
    (files / "held-out.jsonl").write_text("".join((files / "train.jsonl").read_text().splitlines(keepends=True)[:6]))

    def make(**changes):
        values = {
            "model": str(tiny),
            "data": str(files / "train.jsonl"),
            "eval_data": str(files / "held-out.jsonl"),
            "rank": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "save_steps": 2,
            "eval_steps": 2,
            "logging_steps": 1,
        }
        return recipes.parse(values | changes)

    return make


@pytest.fixture(scope="module")
def alone(make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of each arm's own run."""
    directory = tmp_path_factory.mktemp("alone")
    arms = arms_of(make(output_dir=str(directory)), ARMS, "test")
    with pytest.MonkeyPatch.context() as patch:  # as the fixture `drawings` does for each test
        patch.setattr("rankwise.report.figures.svg", lambda *_: "")
        patch.setattr("rankwise.train.run.run.save_loss_curve", lambda *_: None)
        for arm in arms:
            run.train(arm.recipe, SILENT)
    return {arm.name: arm.directory for arm in arms}


def history_of(directory: Path) -> list[dict]:
    return json.loads((directory / "report.json").read_text())["runs"]["run"]


def logged(history: list[dict], key: str) -> torch.Tensor:
    return torch.tensor([row[key] for row in history if key in row], dtype=torch.float64)


def sweep_of(make, directory: Path, table=ARMS, **options):
    recipe = make(output_dir=str(directory))
    return run_sweep(recipe, arms_of(recipe, table, "test"), directory, SILENT, **options)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("rows", [None, 12])
def test_every_arm_is_what_it_is_alone(make, alone, tmp_path, rows):
    sweep = sweep_of(make, tmp_path, rows=rows)
    for outcome in sweep.outcomes:
        arm = outcome.arm
        together, separate = history_of(arm.directory), history_of(alone[arm.name])
        for key in ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"):
            assert torch.allclose(logged(together, key), logged(separate, key), rtol=1e-4), (arm.name, key)
        tensors, expected = tensors_of(arm.directory), tensors_of(alone[arm.name])
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-5), (arm.name, name)
    assert sweep.best.validation == min(outcome.validation for outcome in sweep.outcomes)
    write_sweep(sweep, tmp_path)


class Killed(BaseException):
    """What no part of a run handles."""


def kill_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """Have the process end, as far as a test can tell, once so many checkpoints are written."""
    publish, published = checkpoints.publish, []

    def killing(*args):
        published.append(publish(*args))
        if len(published) == count:
            raise Killed
        return published[-1]

    patch.setattr(checkpoints, "publish", killing)


@pytest.mark.parametrize("written", [1, 5])  # of 9 checkpoints: no arm's first but one, and in the middle of the second
def test_killed_and_called_again_it_ends_as_if_it_had_not_been(make, tmp_path, written):
    table = {name: ARMS[name] for name in ("plain", "wide", "dropout")}
    whole = sweep_of(make, tmp_path / "whole", table)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, written)
        sweep_of(make, tmp_path / "killed", table)
    again = sweep_of(make, tmp_path / "killed", table)
    for before, after in zip(whole.outcomes, again.outcomes, strict=True):
        expected, found = tensors_of(before.arm.directory), tensors_of(after.arm.directory)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), before.arm.name
        assert torch.equal(logged(after.history, "loss"), logged(before.history, "loss"))


def test_half_of_the_arms_have_half_of_the_run_before_them(make, tmp_path):
    table = {f"rate {number}": {"learning_rate": 10.0**-number} for number in (2, 3, 5, 6)}
    sweep = sweep_of(make, tmp_path, table, prune="halving")
    steps = [outcome.steps for outcome in sweep.outcomes]
    assert sorted(steps) == [2, 2, 4, 6]  # after a quarter of 6 steps, a half, and all; evaluated every second
    assert sweep.best.steps == 6
    assert {outcome.stopped.step for outcome in sweep.outcomes if outcome.stopped} == {2, 4}
    page = write_sweep(sweep, tmp_path).read_text()
    assert "by validation loss" in page
    assert (tmp_path / (tmp_path / "best").read_text().strip() / "adapter_model.safetensors").is_file()


def test_one_that_diverges_leaves_the_others_as_they_are(make, alone, tmp_path):
    sweep = sweep_of(make, tmp_path, {"plain": {}, "wild": {"learning_rate": 1e30, "max_grad_norm": 0.0}})
    plain, wild = sweep.outcomes
    assert wild.stopped is not None
    assert wild.stopped.diverged
    assert torch.allclose(logged(plain.history, "loss"), logged(history_of(alone["plain"]), "loss"), rtol=1e-4)
    assert sweep.best is plain


def test_another_sweep_in_its_directory_is_refused(make, tmp_path):
    sweep_of(make, tmp_path, {"plain": {}})
    with pytest.raises(SpecMismatch, match="arms"):
        sweep_of(make, tmp_path, {"plain": {"rank": 2}})


def kill_worker_of(directory: Path, killed: list[int]) -> None:
    """End the process that trains an arm, once the arm has a checkpoint."""
    for _ in range(100_000):
        holder = directory / "run-holder.json"
        if (directory / "checkpoint-2").is_dir() and holder.is_file():
            killed.append(json.loads(holder.read_text())["pid"])
            os.kill(killed[0], signal.SIGKILL)
            return
        time.sleep(0.005)


@pytest.mark.end_to_end
def test_on_a_cluster_a_killed_worker_has_its_share_begun_again(make, alone, tmp_path):
    pytest.importorskip("ray")
    table, killed = {name: ARMS[name] for name in ("plain", "wide")}, []
    killer = threading.Thread(target=kill_worker_of, args=(tmp_path / "wide", killed), daemon=True)
    killer.start()
    sweep = sweep_of(make, tmp_path, table, ray="local")
    assert killed
    assert killed[0] != os.getpid()
    for outcome in sweep.outcomes:
        expected, found = tensors_of(alone[outcome.arm.name]), tensors_of(outcome.arm.directory)
        assert all(torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-5) for name, tensor in expected.items())


def test_arms_on_a_cluster_are_not_judged_together(make, tmp_path):
    with pytest.raises(RecipeError, match="prune"):
        sweep_of(make, tmp_path, {"plain": {}}, ray="local", prune="halving")
