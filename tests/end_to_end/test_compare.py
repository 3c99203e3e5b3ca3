"""A comparison of adapters and full fine-tuning on a tiny model, from the command line."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from rankwise.cli import app
from rankwise.compare import runs as compare_runs
from rankwise.compare.arms import Arm, arms_of
from rankwise.compare.comparison import run_comparison
from rankwise.compare.runs import Budget, RemoteTrials, Trials
from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.data.dataset import load_data
from rankwise.train.run import run
from rankwise.trials import preparing
from rankwise.trials.on_ray import Cluster

SILENT = Console(quiet=True)
ARMS = {"LoRA": {}, "spectral": {"optimizer": "spectral"}, "full, AdamW": {"full": "adamw"}, "Muon": {"full": "muon"}}


@pytest.fixture
def recipe(tiny: Path, pairs_file: Path):
    values = {"model": str(tiny), "data": str(pairs_file), "eval_split": 9, "rank": 2, "seed": 1, "logging_steps": 1}
    return recipes.parse(values | {"per_device_train_batch_size": 4, "max_steps": 3, "alignment_steps": 1})


@pytest.fixture
def arms(recipe) -> dict[str, Arm]:
    plain = recipe.model_copy(update={"alignment_steps": None})
    return {arm.name: arm for arm in arms_of(plain, ARMS, "test")}


@pytest.fixture
def trials(recipe, tmp_path) -> Trials:
    return Trials(tmp_path / "compare", recipe, load_data(recipe), Budget(None), SILENT)


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, float, int]]:
    """The optimizer, rate and seed of every training that really happens."""
    done = []
    train = compare_runs._trained

    def counted(prepared):
        own = prepared.trainer.optimizer
        done.append((type(own).__name__, prepared.recipe.learning_rate, prepared.recipe.seed))
        return train(prepared)

    monkeypatch.setattr(compare_runs, "_trained", counted)
    return done


@pytest.mark.draws
def test_killed_and_called_again_it_goes_on_and_writes_its_page(recipe, tmp_path, trained, monkeypatch):
    monkeypatch.setattr("rankwise.compare.search.MOST_RATES", 2)
    file, out, arms = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "arms.yaml"
    file.write_text(json.dumps(recipe.model_dump(exclude_defaults=True)))
    arms.write_text(json.dumps(ARMS))
    command = ["compare", str(file), "--arms", str(arms), "--seeds", "2", "--steps-to-baseline", "--out", str(out)]

    with monkeypatch.context() as patched:
        train = compare_runs._trained

        def killed(prepared):
            if len(trained) == 5:
                raise KeyboardInterrupt
            return train(prepared)

        patched.setattr(compare_runs, "_trained", killed)
        assert CliRunner().invoke(app, command).exit_code != 0
    assert len(trained) == 5
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "runs" in done.output
    assert "minutes" in done.output
    found = json.loads((out / "compare.json").read_text())
    assert len(found["runs"]) == len(trained)
    assert {run["seed"] for run in found["runs"]} == {1, 2}
    assert {run["steps"] for run in found["runs"]} <= {1, 2, 3}
    assert [row["arm"] for row in found["summary"]] == list(ARMS)
    assert all(row["complete"] and row["seeds"] == 2 for row in found["summary"])
    page = (out / "compare.html").read_text()
    assert all(name in page for name in ARMS)
    assert page.count("<svg") == 3
    before = len(trained)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(trained) == before


def test_no_minutes_are_no_runs(recipe, tmp_path, trained):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(exclude_defaults=True)))
    done = CliRunner().invoke(app, ["compare", str(file), "--minutes", "0", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert trained == []
    assert not any(row["complete"] for row in json.loads((tmp_path / "out" / "compare.json").read_text())["summary"])


def test_the_run_of_an_arm_is_the_run_of_train(arms, trials, tmp_path):
    """The harness changes nothing about training, and its two parts are the held-out samples."""
    one_by_one = {"per_device_eval_batch_size": 1}  # the loss is then the samples' mean
    recipe = arms["LoRA"].recipe.model_copy(update=one_by_one)
    ours = trials.run(Arm("LoRA", recipe))
    result = run.train(recipe.model_copy(update={"output_dir": str(tmp_path / "run")}), SILENT)
    losses = [[row["loss"] for row in history if "loss" in row] for history in (ours.history, result.history)]
    assert losses[0] == losses[1]
    whole = (5 * ours.validation.loss + 4 * ours.test.loss) / 9
    assert whole == pytest.approx(result.metrics["eval_loss_after"], rel=1e-6)
    assert ours.parameters == result.metrics["trainable_parameters"]
    assert ours.steps == 3
    assert 0 < ours.seconds < ours.elapsed


@pytest.mark.parametrize(("name", "optimizer"), [("full, AdamW", "AdamW"), ("Muon", "Muon")])
def test_full_fine_tuning_moves_the_target_weights_and_nothing_else(arms, trials, monkeypatch, name, optimizer):
    moved, train = {}, compare_runs._trained

    def watched(prepared):
        assert type(prepared.trainer.optimizer).__name__ == optimizer
        before = {key: value.clone() for key, value in prepared.model.state_dict().items()}
        trial = train(prepared)
        moved.update({key: not torch.equal(before[key], value) for key, value in prepared.model.state_dict().items()})
        return trial

    monkeypatch.setattr(compare_runs, "_trained", watched)
    trial = trials.run(arms[name])
    assert {key for key, has in moved.items() if has} == {key for key in moved if "_proj" in key}
    assert trial.parameters == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)


def test_every_seed_sees_the_same_samples(arms, trials, monkeypatch):
    seen, train = [], compare_runs._trained

    def watched(prepared):
        seen.append((prepared.trainer.train_dataset["input_ids"][:], prepared.trainer.eval_dataset["input_ids"][:]))
        return train(prepared)

    monkeypatch.setattr(compare_runs, "_trained", watched)
    one, two = (trials.run(arms["LoRA"].at(1e-2, seed)) for seed in (1, 2))
    assert seen[0] == seen[1]
    assert one.validation != two.validation  # another start, another order


def test_a_new_head_is_trained_in_full_fine_tuning_too(tiny, tmp_path):
    data = tmp_path / "labels.jsonl"
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "yes" if i % 2 else "no"} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes.parse(
        {"model": str(tiny), "data": str(data), "task": "classification", "eval_split": 10, "max_steps": 3}
    )
    arms = arms_of(recipe, {"LoRA": {}, "Muon": {"full": "muon"}}, "test")
    trials = Trials(tmp_path / "compare", recipe, load_data(recipe), Budget(None), SILENT)
    head = 2 * 32
    assert trials.run(arms[1]).parameters == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + head
    assert 0 <= trials.run(arms[0]).test.accuracy <= 1


def test_full_fine_tuning_of_weights_in_16_bits_is_refused_before_any_run(recipe, tmp_path, trained):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_copy(update={"dtype": "bfloat16"}).model_dump(exclude_defaults=True)))
    done = CliRunner().invoke(app, ["compare", str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "dtype: float32" in done.output
    assert trained == []
    with pytest.raises(RecipeError, match="32 bits"):
        preparing.with_full_weights(recipe.model_copy(update={"dtype": "bfloat16"}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variant": "adalora", "ship_rank": 1}, "arm 'b': squeeze: expected the variant lora"),
        ({"variant": "adalora", "restart_every": 1}, "arm 'b': restart: expected the variant"),
        ({"restart_rank": 1}, "arm 'b': `restart_rank`"),
        ({"variant": "bottleneck", "optimizer": "spectral"}, "arm 'b': `optimizer`: spectral"),
        ({"optimizer": {"name": "polora", "betas": [2, 2]}}, "arm 'b': .*betas"),
    ],
)
def test_an_arm_whose_method_does_not_go_together_is_refused_before_any_run(recipe, tmp_path, trained, changes, says):
    arms = tmp_path / "arms.yaml"
    arms.write_text(json.dumps({"a": {}, "b": changes}))
    with pytest.raises(RecipeError, match=says):
        run_comparison(recipe, tmp_path / "out", SILENT, arms_file=arms)
    assert trained == []


class OtherMachine(Cluster):
    """A cluster that is this process; what goes there and back is pickled, as on the way to another."""

    def __init__(self) -> None:
        self.started = 0

    def start(self, function, *args):
        self.started += 1
        function, args = pickle.loads(pickle.dumps((function, args)))
        result = pickle.dumps(function(*args))
        return lambda: pickle.loads(result)


def test_an_arm_on_another_machine_comes_to_what_it_does_here(recipe, arms, trials, tmp_path):
    machine = OtherMachine()
    given = (tmp_path / "there", recipe, load_data(recipe), Budget(None), SILENT)
    remote = RemoteTrials(machine, *given)
    for arm in (arms["LoRA"], arms["full, AdamW"]):
        here, there = trials.run(arm), remote.run(arm)
        assert (there.validation, there.test, there.steps) == (here.validation, here.test, here.steps)
        assert remote.run(arm) == there
    assert machine.started == 2, "what is on file is not trained again"
