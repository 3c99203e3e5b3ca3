"""Comparing methods, with runs whose losses are known functions of rate, seed and steps."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rankwise.compare.arms import FIELDS, PRESETS, Arm, arms_of, presets, read_arms
from rankwise.compare.comparison import Announced, Comparison, write_comparison
from rankwise.compare.figures import panels
from rankwise.compare.runs import Budget, BudgetSpent, Score, Trial, Trials
from rankwise.compare.search import Shortest, bisect, climb, compare, runs_needed, tenths
from rankwise.compare.summary import gap_closed, summary
from rankwise.errors import BrokenFile, Diverged, RecipeError
from rankwise.optim import OPTIMIZERS
from rankwise.train import recipe as recipes
from rankwise.train.data.dataset import Data
from rankwise.trials.full import FULL, OTHERS_LR, Joint
from rankwise.trials.held_out import check_held_out

SILENT = Console(quiet=True)
SAMPLE = Dataset.from_list([{"text": "a"}])
STEPS = 40
# Arm → its best rate, and its loss there; a loss rises with the distance from it, in factors of two.
BEST = {"LoRA": (0.004, 1.4), "spectral": (0.03, 1.1), "full": (1e-4, 1.0), "worse": (0.01, 1.6)}


@pytest.fixture
def recipe():
    return recipes.parse({"model": "m", "data": "d", "seed": 5})


@pytest.fixture
def arms(recipe) -> list[Arm]:
    changes = {
        "LoRA": {},
        "spectral": {"optimizer": "spectral"},
        "full": {"full": "adamw"},
        "worse": {"learning_rate": 0.01},
    }
    return arms_of(recipe, changes, "table")


def loss_of(arm: Arm) -> float:
    """Falls with the steps, to the arm's own at its own rate after all of them."""
    rate, loss = BEST[arm.name]
    steps = STEPS if arm.recipe.max_steps == -1 else arm.recipe.max_steps
    away = abs(math.log2(arm.recipe.learning_rate / rate))
    return loss + 0.1 * away + 0.01 * (arm.recipe.seed - 5) + 0.5 * (1 - steps / STEPS)


def trial_of(arm: Arm) -> Trial:
    loss, steps = loss_of(arm), STEPS if arm.recipe.max_steps == -1 else arm.recipe.max_steps
    history = [{"step": 1, "loss": 3.0}, {"step": steps, "loss": loss}, {"step": steps, "eval_loss": loss}]
    return Trial(Score(loss), Score(loss + 0.2), 100, steps, 2.0 * steps, 3.0 * steps, history, "a machine")


class Counted:
    """Trains what it is asked for, up to a number of runs; asked again, it knows the answer."""

    def __init__(self, most: float = math.inf) -> None:
        self.most, self.done = most, dict[str, Trial]()

    def __call__(self, arm: Arm) -> Trial:
        key = arm.name + json.dumps(arm.recipe.model_dump(mode="json"))
        if key not in self.done:
            if len(self.done) >= self.most:
                raise BudgetSpent
            self.done[key] = trial_of(arm)
        return self.done[key]


def test_every_arm_runs_at_its_own_best_rate_over_all_seeds(arms):
    outcomes = compare(arms, Counted(), 3, steps_to_baseline=False)
    assert [outcome.arm.name for outcome in outcomes] == list(BEST)
    for outcome in outcomes:
        rate = BEST[outcome.arm.name][0]
        assert outcome.ladder.rate == min(outcome.ladder.tried, key=lambda tried: abs(math.log2(tried / rate)))
        assert outcome.ladder.bracketed
        assert outcome.complete
        assert list(outcome.seeds) == [5, 6, 7]
        assert list(outcome.ladder.tried) == sorted(outcome.ladder.tried)
        assert outcome.shortest is None


def test_the_number_of_runs_is_within_what_is_announced(arms):
    for shorten in (False, True):
        run = Counted()
        compare(arms, run, 3, steps_to_baseline=shorten)
        least, most = runs_needed(len(arms), 3, steps_to_baseline=shorten)
        assert least <= len(run.done) <= most
    # A ladder whose first rung is the best and an arm that never reaches the goal take the least.
    run = Counted()
    compare([replace(arms[3], name="worse")] * 1, run, 2, steps_to_baseline=True)
    assert len(run.done) == runs_needed(1, 2, steps_to_baseline=True)[0]


def test_a_best_rate_at_the_end_of_the_ladder_is_marked(arms):
    ladder = climb(arms[0], lambda arm: replace(trial_of(arm), validation=Score(1 / arm.recipe.learning_rate)))
    assert not ladder.bracketed
    assert ladder.complete
    assert ladder.rate == max(ladder.tried)


def test_rates_that_diverge_are_worse_than_any_other(arms):
    def run(arm: Arm) -> Trial:
        diverges = arm.recipe.learning_rate > 3e-4
        return Trial(Score(math.inf), Score(math.inf)) if diverges else trial_of(arm)

    ladder = climb(arms[0], run)
    assert ladder.rate == 2e-3 / 2**3  # from 2e-3 downwards, to the largest that does not
    assert ladder.bracketed
    lost = climb(arms[0], lambda _: Trial(Score(math.inf), Score(math.inf)))
    assert not lost.bracketed
    assert lost.rate == min(lost.tried)


@pytest.mark.parametrize("most", range(0, 40, 3))
def test_what_the_budget_leaves_out_is_said_and_what_there_is_counts(arms, most):
    whole = Counted()
    compare(arms, whole, 2, steps_to_baseline=True)
    run = Counted(most)
    outcomes = compare(arms, run, 2, steps_to_baseline=True)
    assert len(run.done) == min(most, len(whole.done))
    assert all(outcome.complete for outcome in outcomes) == (most >= len(whole.done))
    assert sum(len(outcome.runs) for outcome in outcomes) == len(run.done)
    rows = summary(outcomes)
    assert [row.complete for row in rows] == [outcome.complete for outcome in outcomes]
    # Given more time, it goes on: nothing is run twice.
    run.most = math.inf
    compare(arms, run, 2, steps_to_baseline=True)
    assert run.done.keys() == whole.done.keys()


def test_steps_to_the_baseline(arms):
    run = Counted()
    outcomes = compare(arms, run, 1, steps_to_baseline=True)
    lora, spectral, full, worse = outcomes
    goal = lora.seeds[5].validation.loss
    assert lora.shortest is None
    assert worse.shortest == Shortest()
    for outcome in (spectral, full):
        arm, reached = outcome.arm.at(outcome.ladder.rate, 5), outcome.shortest.reached
        by_length = {steps: trial_of(arm.shorter(steps, STEPS)).validation.loss for steps in range(4, 41, 4)}
        assert reached.steps == min(steps for steps, loss in by_length.items() if loss <= goal)
        assert len(outcome.shortest.tried) <= 4
    row = summary(outcomes)[2]
    assert row.steps == full.shortest.reached.steps / STEPS
    assert row.seconds == full.shortest.reached.seconds / lora.seeds[5].seconds


def test_a_shorter_run_has_a_schedule_of_its_own(recipe):
    counted, share = ({"warmup_steps": warmup} for warmup in (10, 0.1))
    for changes, warmup in ((counted, 5), (share, 0.1)):
        arm = Arm("a", recipe.model_copy(update=changes)).shorter(20, 40)
        assert (arm.recipe.max_steps, arm.recipe.warmup_steps) == (20, warmup)


@given(st.data())
def test_a_shorter_run_restarts_as_often_and_ships_in_the_same_share_of_its_steps(data):
    of = data.draw(st.integers(2, 200))
    steps, every = data.draw(st.integers(1, of - 1)), data.draw(st.integers(1, of - 1))
    ship = data.draw(st.integers(0, of - every - 1))
    reshaping = {"restart_every": every, "restart_rank": 2, "ship_rank": 2, "ship_steps": ship}
    shorter = Arm("a", recipes.parse({"model": "m", "data": "d", **reshaping})).shorter(steps, of).recipe
    assert abs(shorter.ship_steps / steps - ship / of) < 1 / steps
    assert shorter.restart_every == (every * steps // of or None)
    # Or the run would be refused.
    assert (shorter.restart_every or 0) < steps - shorter.ship_steps
    assert (shorter.restart_rank is None) == (shorter.restart_every is None)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_and_full_fine_tuning_leave_out_what_a_recipe_does_to_ranks(recipe, name):
    reshaping = {"restart_every": 2, "restart_rank": 4, "ship_rank": 2}
    assert not any(arm.recipe.reshapes for arm in presets(recipe.model_copy(update=reshaping), name))
    a, b = arms_of(recipe.model_copy(update=reshaping), {"a": {}, "b": {"full": "muon"}}, "t")
    assert a.recipe.reshapes
    assert not b.recipe.reshapes


@given(st.integers(1, 200), st.integers(1, 250))
def test_bisection_finds_the_shortest_length(steps, needed):
    lengths, asked = tenths(steps), []
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == steps
    found = bisect(lambda length: asked.append(length) or length >= needed, lengths)
    assert found == next((length for length in lengths if length >= needed), steps)
    assert len(asked) <= 4
    assert steps not in asked


@given(st.lists(st.tuples(*[st.floats(0.5, 3)] * 3), min_size=1, max_size=5))
def test_the_gap_closed_is_that_of_the_means(losses):
    arm, baseline, full = (dict(enumerate(column)) for column in zip(*losses, strict=True))
    start, goal = (sum(each.values()) / len(losses) for each in (baseline, full))
    closed = gap_closed(arm, baseline, full)
    if start <= goal:
        assert closed is None
    elif start - goal > 1e-6:
        assert start - closed * (start - goal) == pytest.approx(sum(arm.values()) / len(losses), abs=1e-5)
    assert gap_closed(arm, {seed: loss + 1 for seed, loss in full.items()}, full) is not None
    assert gap_closed(baseline, baseline, full) in (None, 0.0)
    assert gap_closed(full, baseline, full) in (None, 1.0)


def test_a_gap_is_of_seeds_that_all_have():
    assert gap_closed({0: 1.0}, {0: 2.0, 1: 9.0}, {1: 1.0, 2: 1.0}) is None
    assert gap_closed({0: 1.5, 3: 0.0}, {0: 2.0, 1: 9.0}, {0: 1.0, 2: 1.0}) == 0.5


def test_the_test_samples_choose_nothing(arms):
    def upside_down(arm: Arm) -> Trial:
        return replace(trial_of(arm), test=Score(-trial_of(arm).validation.loss))

    chosen = compare(arms, Counted(), 2, steps_to_baseline=True)
    other = compare(arms, upside_down, 2, steps_to_baseline=True)
    assert [each.ladder.rate for each in chosen] == [each.ladder.rate for each in other]
    assert [each.test.mean for each in summary(other)] == [-each.validation.mean for each in summary(chosen)]


# --- runs on disk ----------------------------------------------------------------------------------------------------


class FakeTrials(Trials):
    """Trains nothing, but keeps its runs as real ones are kept."""

    def __init__(self, directory: Path, recipe, budget: Budget | None = None, train: Callable = trial_of) -> None:
        super().__init__(directory, recipe, Data(SAMPLE, SAMPLE, "text"), budget or Budget(None), SILENT)
        self.trained, self._train = [], train

    def train(self, arm: Arm) -> Trial:
        trial = self._train(arm)
        self.trained.append(arm)
        return trial


def test_runs_are_done_once_and_read_as_they_were(arms, recipe, tmp_path):
    first = FakeTrials(tmp_path, recipe)
    before = compare(arms, first.run, 2, steps_to_baseline=True)
    again = FakeTrials(tmp_path, recipe)
    assert compare(arms, again.run, 2, steps_to_baseline=True) == before
    assert again.trained == []
    # Samples are drawn by the recipe's seed, so that of another recipe's they are other runs.
    other = FakeTrials(tmp_path, recipe.model_copy(update={"seed": 6}))
    other.run(arms[0])
    assert len(other.trained) == 1


def test_killed_anywhere_it_goes_on_without_repeating_a_run(arms, recipe, tmp_path):
    killed_at = 9

    def dies(arm: Arm) -> Trial:
        if len(trials.trained) == killed_at:
            raise KeyboardInterrupt
        return trial_of(arm)

    trials = FakeTrials(tmp_path, recipe, train=dies)
    with pytest.raises(KeyboardInterrupt):
        compare(arms, trials.run, 2, steps_to_baseline=True)
    rest, whole = FakeTrials(tmp_path, recipe), FakeTrials(tmp_path / "whole", recipe)
    assert compare(arms, rest.run, 2, steps_to_baseline=True) == compare(arms, whole.run, 2, steps_to_baseline=True)
    assert trials.trained + rest.trained == whole.trained


def test_a_run_that_diverged_is_not_repeated(arms, recipe, tmp_path):
    def diverges(arm: Arm) -> Trial:
        asked.append(arm)
        raise Diverged("step 3: expected a finite loss, found nan")

    asked = []
    for _ in range(2):
        trial = FakeTrials(tmp_path, recipe, train=diverges).run(arms[0])
        assert trial.validation.loss == trial.test.loss == math.inf
    assert len(asked) == 1


def test_past_its_minutes_a_budget_starts_no_run_but_reads_those_on_file(arms, recipe, tmp_path):
    now = 0.0
    budget = Budget(2, lambda: now)
    trials = FakeTrials(tmp_path, recipe, budget)
    trials.run(arms[0])
    now = 119.0
    trials.run(arms[1])
    now = 120.0
    with pytest.raises(BudgetSpent):
        trials.run(arms[2])
    assert trials.run(arms[0]) == trial_of(arms[0])
    assert FakeTrials(tmp_path, recipe).run(arms[2]) == trial_of(arms[2])


def test_a_broken_record_is_named(arms, recipe, tmp_path):
    trials = FakeTrials(tmp_path, recipe)
    trials.run(arms[0])
    (record,) = tmp_path.rglob("outcome.json")
    for text in ("{", "[]", '{"validation": 1}'):
        record.write_text(text)
        with pytest.raises(BrokenFile, match="outcome"):
            trials.run(arms[0])


def test_how_many_runs_and_how_long_is_said_before(arms):
    console = Console(record=True, width=120, file=io.StringIO())
    announced = Announced(Counted(), (10, 30), 5, console)
    assert "10 to 30 runs" in console.export_text(clear=False)
    announced(arms[0])
    announced(arms[1])
    text = console.export_text()
    assert text.count("20 to 60 minutes") == 1  # 120 s a run
    assert "after 5 minutes" in text


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_arms_of_any_recipe(name):
    recipe = recipes.parse(
        {"model": "m", "data": "d", "init": "pissa", "optimizer": "polora", "scaling": "rslora", "rank": 4}
    )
    arms = {arm.name: arm for arm in presets(recipe, name)}
    first = arms["LoRA"].recipe
    assert next(iter(arms)) == "LoRA"
    assert (first.init, first.optimizer, first.scaling, first.variant) == ("kaiming", "adamw", "lora", "lora")
    assert first.learning_rate == 2e-3
    full = arms["full, AdamW"]
    assert (full.full, full.recipe.learning_rate) == ("adamw", first.learning_rate / 10)
    assert all(arm.recipe.rank == 4 and arm.recipe.seed == recipe.seed for arm in arms.values())


def test_an_arm_keeps_what_it_does_not_change(recipe):
    changed = recipe.model_copy(update={"init": "lora-ga", "rank": 3})
    a, b = arms_of(changed, {"a": {"rank": 2}, "b": {"optimizer": "spectral"}}, "t")
    assert (a.recipe.init, a.recipe.rank, b.recipe.rank) == ("lora-ga", 2, 3)
    assert (a.recipe.learning_rate, b.recipe.learning_rate) == (2e-3, 0.03)
    assert arms_of(changed, {"a": {"learning_rate": 0.5}, "b": {}}, "t")[0].recipe.learning_rate == 0.5


def test_a_new_optimizer_begins_at_its_rows_rate(recipe, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sign", replace(OPTIMIZERS["adamw"], learning_rate=0.7))
    arm, _ = arms_of(recipe, {"a": {"optimizer": "sign"}, "b": {}}, "t")
    assert arm.recipe.learning_rate == 0.7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {}", "two arms at least"),
        ("a: {}\nb: {max_steps: 3}", "b.*max_steps.*the same for every arm"),
        ("a: {}\nb: {data: other}", "data"),
        ("a: {}\nb: {seed: 1}", "seed"),
        ("a: {}\nb: {varant: dora}", "did you mean 'variant'"),
        ("a: {}\nb: {variant: dara}", "arm 'b'.*did you mean 'dora'"),
        ("a: {}\nb: {full: muom}", "did you mean 'muon'"),
        ("a: {}\nb: {full: muon, rank: 3}", "rank"),
        ("a: {}\nb: 3", "lines"),
        ("- a", "DoRA: "),
    ],
)
def test_arms_that_cannot_be_are_refused_with_their_place(recipe, tmp_path, text, says):
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says) as caught:
        read_arms(recipe, path)
    assert str(path) in str(caught.value)


def test_fields_of_arms_are_fields_of_recipes():
    assert set(FIELDS) <= recipes.Recipe.model_fields.keys()
    with pytest.raises(RecipeError, match="articles"):
        presets(recipes.parse({"model": "m", "data": "d"}), "article")


def test_held_out_samples_make_two_parts_at_least():
    for held_out in (None, SAMPLE):
        with pytest.raises(RecipeError, match="eval_split"):
            check_held_out(Data(SAMPLE, held_out, "text"), "compare")


# --- full fine-tuning -------------------------------------------------------------------------------------------------


def test_muon_and_adamw_step_as_one_at_rates_of_their_own(recipe):
    """Beside each alone, through a reloaded state as accelerate does it, and with a schedule."""
    recipe = recipe.model_copy(update={"learning_rate": 0.02, "weight_decay": 0.1})
    ours, alone = ([torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))] for _ in range(2))
    for mine, other in zip(ours, alone, strict=True):
        other.data.copy_(mine.data)
    joint = FULL["muon"].optimizer(ours[:1], ours[1:], recipe)
    joint.load_state_dict(joint.state_dict())
    muon = torch.optim.Muon(alone[:1], 0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(alone[1:], OTHERS_LR, weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in (joint, muon, adamw)]
    for _ in range(3):
        for mine, other in zip(ours, alone, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in (joint, muon, adamw):
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert isinstance(joint, Joint)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, alone, strict=True))


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 13, math.inf])
def test_a_page_and_its_numbers_are_written_however_far_it_came(arms, recipe, tmp_path, most):
    outcomes = compare(arms, Counted(most), 2, steps_to_baseline=True)
    page = write_comparison(Comparison(recipe, 2, outcomes, summary(outcomes)), tmp_path)
    text = page.read_text()
    found = json.loads((tmp_path / "compare.json").read_text())
    assert len(found["runs"]) == sum(len(outcome.runs) for outcome in outcomes)
    assert [row["arm"] for row in found["summary"]] == list(BEST)
    assert ("incomplete" in text) == (most < math.inf)
    keys = {"arm", "rate", "seed", "validation", "test", "steps", "seconds", "machine"}
    assert all(keys <= run.keys() for run in found["runs"])
    if most == math.inf:
        spectral = found["summary"][1]
        assert spectral["gap_closed"] == pytest.approx(gap(outcomes), abs=1e-9)
        assert f"{spectral['gap_closed']:.0%}" in text


def gap(outcomes) -> float:
    lora, spectral, full = (sum(t.test.loss for t in each.seeds.values()) for each in outcomes[:3])
    return (lora - spectral) / (lora - full)


def test_the_table_names_what_diverged_and_shows_accuracy(arms, monkeypatch):
    monkeypatch.setattr("rankwise.compare.figures.svg", lambda *_: "")

    def run(arm: Arm) -> Trial:
        if arm.name == "worse":
            return Trial(Score(math.inf), Score(math.inf))
        return replace(trial_of(arm), test=Score(1.0, 0.8 + 0.01 * arm.recipe.seed))

    outcomes = compare(arms, run, 2, steps_to_baseline=False)
    table = panels(outcomes, summary(outcomes), "nats")[0].table
    by_arm = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert by_arm["worse"]["test"] == "diverged"
    assert by_arm["LoRA"]["accuracy"] == "85.5% ± 0.7%"
    assert by_arm["LoRA"]["gap to full closed"] == "–"  # all equal: no gap
    beside = {arm: row["beside LoRA"] for arm, row in by_arm.items()}
    assert beside == {"LoRA": "–", "spectral": "+0.0000 ± 0.0000", "full": "+0.0000 ± 0.0000", "worse": "diverged"}
    assert by_arm["LoRA"]["parameters"] == "100"
