"""Studies on a tiny model: every arm tuned, every run done once, results as JSON and a page."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from rankwise.cli import app
from rankwise.errors import BrokenFile, RecipeError, SpecError, TargetError
from rankwise.sites import Site
from rankwise.studies import STUDIES, run_study
from rankwise.studies import runs as study_runs
from rankwise.studies.arms import compare
from rankwise.studies.runs import Runs, Trained
from rankwise.studies.weight_types import ARMS, attention_names, weight_types
from rankwise.train import recipe as recipes
from rankwise.train.run import run

SILENT = Console(quiet=True)


@pytest.fixture
def recipe(tiny: Path, pairs_file: Path):
    return recipes.parse(
        {
            "model": str(tiny),
            "data": str(pairs_file),
            "eval_split": 8,
            "rank": 2,
            "target_modules": ["q_proj", "v_proj"],
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
        }
    )


@pytest.fixture
def small_studies(monkeypatch):
    """Few arms and rungs: the machinery is the same."""
    monkeypatch.setattr("rankwise.studies.ranks.RANKS", (1, 4))
    monkeypatch.setattr("rankwise.studies.weight_types.ARMS", ("q", "qv"))
    from rankwise.tuning import tune

    def short(*args, **kwargs):
        return tune(*args, **{**kwargs, "most": 2})

    monkeypatch.setattr("rankwise.studies.arms.tune", short)
    monkeypatch.setattr("rankwise.studies.intrinsic_dimension.tune", short)


@pytest.fixture
def trainings(monkeypatch) -> list[float]:
    """The learning rate of every training that really happens."""
    done: list[float] = []
    fit = study_runs._fit

    def counted(trainer):
        done.append(trainer.args.learning_rate)
        return fit(trainer)

    monkeypatch.setattr(study_runs, "_fit", counted)
    return done


def test_a_run_is_done_once_and_kept(recipe, tmp_path, trainings):
    first = Runs(tmp_path, SILENT).adapter(recipe)
    again = Runs(tmp_path, SILENT).adapter(recipe)
    assert again == first
    assert len(trainings) == 1
    assert (first.adapter / "adapter_model.safetensors").is_file()
    other = Runs(tmp_path, SILENT).adapter(recipe.model_copy(update={"learning_rate": 2e-2}))
    assert other.loss != first.loss
    assert len(trainings) == 2
    elsewhere = recipe.model_copy(update={"output_dir": "elsewhere"})
    Runs(tmp_path, SILENT).adapter(elsewhere)
    assert len(trainings) == 2


def test_other_data_under_the_same_name_are_another_run(recipe, tmp_path, pairs_file, trainings):
    Runs(tmp_path / "study", SILENT).adapter(recipe)
    pairs_file.write_text(pairs_file.read_text().replace("what I say", "what I sing"))
    Runs(tmp_path / "study", SILENT).adapter(recipe)
    assert len(trainings) == 2


def test_a_run_that_failed_is_run_again_and_a_broken_record_named(recipe, tmp_path, monkeypatch):
    runs = Runs(tmp_path, SILENT)

    def dies(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study_runs, "_fit", dies)
        runs.adapter(recipe)
    outcome = runs.adapter(recipe)
    record = outcome.adapter.parent / "outcome.json"
    record.write_text("{")
    with pytest.raises(BrokenFile, match="outcome"):
        runs.adapter(recipe)


def test_the_run_of_an_arm_is_the_run_of_train(recipe, tmp_path):
    """A study's harness changes nothing about training."""
    ours = Runs(tmp_path / "study", SILENT).adapter(recipe)
    theirs = run.train(recipe.model_copy(update={"output_dir": str(tmp_path / "run")}), SILENT)
    assert ours.loss == pytest.approx(theirs.metrics["eval_loss_after"], rel=1e-6)
    assert ours.parameters == theirs.metrics["trainable_parameters"]


def test_full_fine_tuning_trains_the_target_weights_and_nothing_else(recipe, tmp_path, monkeypatch):
    seen = {}
    fit = study_runs._fit

    def watched(trainer):
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        result = fit(trainer)
        after = trainer.model.state_dict()
        seen.update({name: not torch.equal(value, after[name]) for name, value in before.items()})
        return result

    monkeypatch.setattr(study_runs, "_fit", watched)
    outcome = Runs(tmp_path, SILENT).full(recipe)
    moved = {name for name, changed in seen.items() if changed}
    assert moved == {f"model.layers.{i}.self_attn.{k}_proj.weight" for i in (0, 1) for k in "qv"}
    assert outcome.parameters == 2 * (32 * 32 + 16 * 32)


def test_a_random_subspace_trains_as_many_numbers_as_it_has(recipe, tmp_path):
    runs = Runs(tmp_path, SILENT)
    rate = recipe.model_copy(update={"learning_rate": 0.05})
    before = runs.untrained(recipe)
    did = runs.random_subspace(rate, 64, layer_scales=False)
    said = runs.random_subspace(rate, 64, layer_scales=True)
    assert did.parameters == said.parameters == 64
    assert len({before, did.loss, said.loss}) == 3
    assert runs.untrained(rate) == before


def test_a_study_without_held_out_samples_is_refused(recipe, tmp_path):
    with pytest.raises(SpecError, match="held-out"):
        Runs(tmp_path, SILENT).adapter(recipe.model_copy(update={"eval_split": None}))


class Recorded(Runs):
    """Trains nothing: an arm's loss is a function of its rate, and its best rate depends on its rank."""

    def __init__(self) -> None:
        self.asked = []

    def adapter(self, recipe):
        self.asked.append(recipe)
        return Trained(abs(recipe.learning_rate * recipe.rank - 0.04) + recipe.seed, recipe.rank, 1.0, None)


def test_every_arm_gets_its_own_best_rate_before_arms_are_compared(recipe):
    runs = Recorded()
    arms = compare(runs, {str(r): recipe.model_copy(update={"rank": r}) for r in (1, 4)}, seeds=3)
    assert (arms["1"].learning_rate, arms["4"].learning_rate) == (0.04, 0.01)
    assert all(arm.bracketed and list(arm.losses) == [0, 1, 2] for arm in arms.values())
    others = [each for each in runs.asked if each.seed > 0]
    assert {(each.rank, each.learning_rate) for each in others} == {(1, 0.04), (4, 0.01)}


def smollm2_sites() -> list[Site]:
    shapes = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
    shapes |= {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}
    return [Site(f"layers.{i}.{name}", "linear", shape, 1, 1.0) for i in range(30) for name, shape in shapes.items()]


def test_arms_of_the_weight_types_spend_one_budget(recipe):
    runs, sites = Recorded(), smollm2_sites()
    weight_types(recipe.model_copy(update={"rank": 10}), sites, runs, seeds=1)
    spent = {}
    for each in runs.asked:
        chosen = [site for site in sites if site.name.rpartition(".")[2] in each.target_modules]
        spent[tuple(each.target_modules)] = each.rank * sum(sum(site.shape) for site in chosen)
    budget = 10 * 30 * 1152
    attention = {targets: cost for targets, cost in spent.items() if len(targets) <= 4}
    assert set(attention.values()) == {budget}
    assert max(spent.values()) <= budget
    assert len(spent) == len(ARMS) + 1


def test_fused_projections_cannot_be_studied_apart():
    with pytest.raises(TargetError, match="c_attn"):
        attention_names([Site("h.0.attn.c_attn", "conv1d", (96, 32), 1, 1.0)])


@pytest.mark.draws
@pytest.mark.usefixtures("small_studies")
def test_every_study_writes_its_numbers_and_its_page_and_goes_on_where_it_was(recipe, tmp_path, trainings):
    file, out = tmp_path / "recipe.yaml", tmp_path / "studies"
    file.write_text(json.dumps(recipe.model_dump(exclude_defaults=True)))
    for name in STUDIES:
        done = CliRunner().invoke(app, ["study", name, str(file), "--out", str(out), "--seeds", "2"])
        assert done.exit_code == 0, done.output
        results = json.loads((out / f"{name}.json").read_text())
        assert results["what"] == STUDIES[name].summary
        page = (out / f"{name}.html").read_text()
        assert "<figure" in page and "</html>" in page
    ranks = json.loads((out / "ranks.json").read_text())["arms"]
    assert ranks.keys() == {"1", "4"}
    assert all(len(arm["losses"]) == 2 and len(arm["tried"]) == 2 for arm in ranks.values())
    amplified = json.loads((out / "amplification.json").read_text())["by_rank"]
    assert amplified["4"]["q_proj"][0]["factor"] > 0
    found = json.loads((out / "intrinsic-dimension.json").read_text())
    assert found["goal"] == pytest.approx(found["pretrained"] - 0.9 * (found["pretrained"] - found["full"]["loss"]))
    before = len(trainings)
    assert CliRunner().invoke(app, ["study", "ranks", str(file), "--out", str(out)]).exit_code == 0
    assert len(trainings) == before


def test_names_and_seeds_that_cannot_be(recipe, tmp_path):
    with pytest.raises(RecipeError, match="ranks"):
        run_study("rank", recipe, tmp_path, 2, SILENT)
    with pytest.raises(RecipeError, match="seed"):
        run_study("ranks", recipe, tmp_path, 0, SILENT)
    with pytest.raises(RecipeError, match="two seeds"):
        run_study("subspace", recipe, tmp_path, 1, SILENT)
