"""Runs with `learning_rate: auto`: the same, bit for bit, as runs with the rate that it chooses."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import rankwise.train.learning_rate.choice as learning_rate
from rankwise.cli import app
from rankwise.compare.arms import arms_of
from rankwise.errors import RecipeError
from rankwise.studies import run_study
from rankwise.train import recipe as recipes
from rankwise.train.learning_rate.choice import Search
from rankwise.train.learning_rate.probe import Probe
from rankwise.train.run import run

SILENT = Console(quiet=True)


@pytest.fixture
def make(tiny: Path, pairs_file: Path, tmp_path: Path):
    def make(**changes):
        values = {
            "model": str(tiny),
            "data": str(pairs_file),
            "eval_split": 8,
            "rank": 4,
            "learning_rate": "auto",
            "rate_probe_steps": 16,
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "run"),
        }
        return recipes.parse(values | changes)

    return make


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that probes take."""
    taken = []
    step = Probe._step

    def counted(self, optimizer, number, batches):
        taken.append(number)
        step(self, optimizer, number, batches)

    monkeypatch.setattr(Probe, "_step", counted)
    return taken


def same(one: Path, two: Path) -> bool:
    """Whether two adapters hold the same bits; of checkpoints the optimizer's state and torch's random one too."""
    for name in ("optimizer.pt", "rng_state.pth"):
        if (one / name).exists():
            states = [torch.load(folder / name, weights_only=False) for folder in (one, two)]
            part = "state" if name == "optimizer.pt" else "cpu"
            torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    files = sorted(path.name for path in one.glob("*.safetensors"))
    for name in files:
        torch.testing.assert_close(load_file(one / name), load_file(two / name), rtol=0, atol=0)
    return bool(files)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init": "lora-ga", "scaling": "rslora", "dropout": 0.1, "optimizer": "spectral"},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "num_train_epochs": 1.0, "max_steps": -1},
        {"variant": "adalora", "optimizer": "adamw", "bf16": True},
    ],
    ids=["plain", "lora-ga", "accumulation", "adalora"],
)
def test_a_run_takes_the_steps_of_one_with_the_rate_named(make, tmp_path, changes, steps):
    chosen = run.train(make(**changes, output_dir=str(tmp_path / "chosen")), SILENT)
    choice = chosen.prepared.choice
    assert len(steps) == choice.steps == 2 * len(choice.tried) <= 16
    assert chosen.metrics["learning_rate"] == choice.rate
    named = run.train(make(**changes, learning_rate=choice.rate, output_dir=str(tmp_path / "named")), SILENT)
    assert len(steps) == choice.steps  # no more
    assert [row.get("loss") for row in named.history] == [row.get("loss") for row in chosen.history]
    assert named.metrics["learning_rate_choice"] is None
    for name in ("adapter", f"checkpoint-{chosen.metrics['steps']}"):
        assert same(tmp_path / "chosen" / name, tmp_path / "named" / name)


def test_the_choice_is_kept_with_the_run_and_not_made_again(make, tmp_path, steps):
    whole = run.train(make(output_dir=str(tmp_path / "run")), SILENT)
    record = json.loads((tmp_path / "run" / learning_rate.FILE).read_text())
    assert record == whole.metrics["learning_rate_choice"] == whole.prepared.choice.to_dict()
    assert whole.prepared.recipe.learning_rate == record["rate"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert record["reasons"][0] in page and f"{record['tried'][0][0]:g}" in page
    expected = load_file(whole.adapter / "adapter_model.safetensors")
    del steps[:]
    (tmp_path / "run" / "metrics.json").unlink()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = run.train(make(resume_from_checkpoint=checkpoint, rate_probe_steps=60), SILENT)
    assert not steps
    found = load_file(resumed.adapter / "adapter_model.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert resumed.metrics["learning_rate_choice"] == record


def test_a_run_killed_while_it_probes_begins_again(make, tmp_path, monkeypatch, steps):
    whole = run.train(make(output_dir=str(tmp_path / "whole")), SILENT)
    taken = list(steps)

    def killed(self):
        self.probe(self.guess)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Search, "choose", killed)
        run.train(make(), SILENT)
    assert not (tmp_path / "run" / learning_rate.FILE).exists()
    del steps[:]
    assert same(run.train(make(), SILENT).adapter, whole.adapter)
    assert steps == taken


def test_what_it_will_take_is_said_before(make, tmp_path):
    path = tmp_path / "recipe.yaml"
    fields = make().model_dump(exclude_defaults=True) | {"rate_probe_steps": None}
    del fields["learning_rate"]
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
    checked = CliRunner().invoke(app, ["check", str(path), "--learning-rate", "auto"], env={"COLUMNS": "400"})
    assert checked.exit_code == 0, checked.output
    said = " ".join(checked.output.split())
    assert "Learning rate: auto. From rules 0.019, the product of 0.00126: full fine-tuning of layers with 32" in said
    assert "30 to 80 optimizer steps before the first of the run's 4" in said
    assert not list(tmp_path.glob("run/*.json"))


def test_the_rates_of_whole_runs_are_compared_not_guessed(make):
    with pytest.raises(RecipeError, match=r"arms.yaml: arm 'DoRA': learning_rate: expected the number at which"):
        arms_of(make(learning_rate=1e-3), {"LoRA": {}, "DoRA": {"learning_rate": "auto"}}, "arms.yaml")
    arms = arms_of(make(), {"LoRA": {}, "full": {"full": "adamw"}}, "arms.yaml")  # the recipe's own plays no part
    assert all(arm.recipe.peak_learning_rate > 0 for arm in arms)
    with pytest.raises(RecipeError, match="auto is chosen by a run of its own"):
        run_study("ranks", make(), Path("unused"), 1, SILENT)


def test_several_processes_are_refused(make, monkeypatch):
    prepared = run.prepare(run.load(make(), SILENT), SILENT)
    monkeypatch.setattr(type(prepared.trainer.args), "world_size", 2)
    with pytest.raises(RecipeError, match="chosen in one process, found 2"):
        learning_rate.search(prepared.trainer, prepared.loaded.sites)


@pytest.mark.parametrize("value", ["fast", 0, -1e-3, True])
def test_no_other_rate_is_taken(make, value):
    with pytest.raises(RecipeError, match=r"`learning_rate`: expected .*or 'auto'"):
        make(learning_rate=value)


def test_what_stays_at_a_rate_of_its_own_does_not_follow(make):
    """A rate named for what is in no pair is the recipe's, whatever the pairs' comes to."""
    optimizer = {"name": "spectral", "others_lr": 1e-3}
    prepared = run.prepare(run.load(make(optimizer=optimizer, modules_to_save=["model.norm"]), SILENT), SILENT)
    assert [group["lr"] for group in prepared.trainer.optimizer_at(0.5).param_groups] == [0.5, 1e-3]
    assert prepared.trainer.optimizer is None
