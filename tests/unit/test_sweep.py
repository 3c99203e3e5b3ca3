"""What a sweep is made of: its arms, who is stopped, how rows are put together, how many fit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import RecipeError, SpecMismatch
from rankwise.sweep.arms import arms_of, chosen_arms, grid_arms, read_arms
from rankwise.sweep.memory import Memory
from rankwise.sweep.pruning import halving, median_rule
from rankwise.sweep.resuming import check_plan
from rankwise.sweep.shared_model import joined, row_ranges
from rankwise.train import recipe as recipes


@pytest.fixture
def recipe():
    return recipes.parse({"model": "m", "data": "d", "output_dir": "out"})


def test_a_grid_has_every_combination(recipe):
    arms = grid_arms(recipe, ["learning-rate=1e-4,3e-4", "optimizer=adamw,{name: lora-plus, ratio: 4}"])
    assert [(arm.recipe.learning_rate, arm.recipe.optimizer) for arm in arms] == [
        (rate, optimizer) for rate in (1e-4, 3e-4) for optimizer in ("adamw", {"name": "lora-plus", "ratio": 4})
    ]
    assert arms[0].name == "learning_rate=0.0001 optimizer=adamw"
    assert len({arm.directory for arm in arms}) == 4
    assert all(arm.directory.parent == Path("out") for arm in arms)


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        (["model=a,b"], "model"),
        (["max_length=1,2"], "max_length"),
        (["max_steps=1,2"], "max_steps"),
        (["learning_rat=1"], "learning_rate"),
        (["rank=0,1"], "rank"),
        (["rank="], "rank=4,8"),
        (["rank=[1"], "rank"),
        (["rank=1", "rank=2"], "already"),
        (["rank=4,4"], "twice"),
    ],
)
def test_axes_that_make_no_arms_are_refused_by_name(recipe, axes, named):
    with pytest.raises(RecipeError, match=named):
        grid_arms(recipe, axes)


def test_names_that_are_one_directory_are_refused(recipe):
    with pytest.raises(RecipeError, match="directories"):
        arms_of(recipe, {"a b": {}, "a/b": {"rank": 2}}, "test")
    names = ["../a", "..", "a/../../b", ".hidden", "é", "a b"]
    places = [arms_of(recipe, {name: {}}, "test")[0].directory for name in names]
    assert all(place.parent == Path("out") and not place.name.startswith(".") for place in places)


def test_arms_come_from_a_file_or_a_grid(recipe, tmp_path):
    file = tmp_path / "arms.yaml"
    file.write_text("wide: {rank: 32}\nplain: {}\n")
    assert [arm.recipe.rank for arm in read_arms(recipe, file)] == [32, recipe.rank]
    for table, grid in ((file, ["rank=1"]), (None, None), (None, [])):
        with pytest.raises(RecipeError, match="either"):
            chosen_arms(recipe, tmp_path, table, grid)
    file.write_text("wide: 32\n")
    with pytest.raises(RecipeError, match="wide"):
        read_arms(recipe, file)


@given(count=st.integers(1, 33))
def test_halving_ends_with_one(count):
    losses = {f"{number:02}": float(number) for number in range(count)}
    for step in range(1, 64):
        stopped = halving(losses, step / 64, began=count)
        losses = {arm: loss for arm, loss in losses.items() if arm not in stopped}
    assert list(losses) == ["00"]


def test_halving_stops_the_worse_half_at_each_rung():
    losses = {arm: float(place) for place, arm in enumerate("abcdefgh")}
    assert not halving(losses, 0.12, began=8)
    assert sorted(halving(losses, 0.125, began=8)) == list("efgh")
    assert sorted(halving({arm: losses[arm] for arm in "abcd"}, 0.125, began=8)) == []
    assert sorted(halving(losses, 0.5, began=8)) == list("bcdefgh")


def test_the_median_spares_the_first_quarter_and_ties():
    losses = {"a": 1.0, "b": 1.0, "c": 5.0}
    assert not median_rule(losses, 0.2, began=3)
    assert list(median_rule(losses, 0.5, began=3)) == ["c"]


def test_rows_are_padded_and_masked():
    batches = [
        {
            "input_ids": torch.full((rows, length), 7),
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
            "labels": torch.zeros(rows, length),
        }
        for rows, length in ((2, 3), (1, 5))
    ]
    together = joined(batches, {"input_ids": 9})
    assert together.keys() == {"input_ids", "attention_mask"}
    assert together["input_ids"].tolist() == [[7, 7, 7, 9, 9], [7, 7, 7, 9, 9], [7] * 5]
    assert together["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1] * 5]
    assert list(row_ranges(batches)) == [slice(0, 2), slice(2, 3)]


def test_memory_holds_as_many_batches_as_fit():
    memory = Memory(base=100, arms=[10] * 8, activations=60, available=500)
    assert memory.together == 3  # 0.8 · 500 − 100 − 80 = 220
    assert memory.fitting == 24  # 0.8 · 500 − 100 − 60 = 240
    assert Memory(base=1000, arms=[10], activations=60, available=500).together == 1


def test_another_plan_is_refused(tmp_path):
    check_plan(tmp_path / "new", {"arms": {"a": {}}, "rows": None})
    check_plan(tmp_path / "new", {"arms": {"a": {}}, "rows": None})
    with pytest.raises(SpecMismatch, match="other rows"):
        check_plan(tmp_path / "new", {"arms": {"a": {}}, "rows": 4})
