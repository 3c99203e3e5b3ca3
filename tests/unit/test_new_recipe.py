"""`rankwise new` writes a recipe that can be used, and never over another."""

import pytest
from typer.testing import CliRunner

from rankwise.cli import app
from rankwise.cli.new_recipe import QUESTIONS, answers, write_recipe
from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes


def invoke(*arguments, **options):
    return CliRunner().invoke(app, ["new", *map(str, arguments)], env={"COLUMNS": "300"}, **options)


def test_all_that_is_offered_makes_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    assert invoke(path, "--yes").exit_code == 0
    recipe = recipes.load(path)
    assert {name: str(getattr(recipe, name)) for name in QUESTIONS} == QUESTIONS | {"num_train_epochs": "3.0"}
    assert all("  # " in line for line in path.read_text().splitlines())


def test_answers_and_flags_are_in_it_and_wrong_ones_are_asked_again(tmp_path):
    path = tmp_path / "recipe.yaml"
    typed = ["my-model", "", "[a.jsonl, b.jsonl]", "", "lora-gaa", "lora-ga", "eight", "4", "", "1", "", "out"]
    done = invoke(path, "--dropout", "0.1", "--warmup-steps", "0.1", input="\n".join(typed) + "\n")
    assert done.exit_code == 0, done.output
    assert "did you mean 'lora-ga'" in done.output
    assert "`rank`: expected a valid integer; found 'eight' (str)" in done.output
    recipe = recipes.load(path)
    assert (recipe.model, recipe.data, recipe.rank) == ("my-model", ["a.jsonl", "b.jsonl"], 4)
    assert (recipe.init, recipe.dropout, recipe.warmup_steps, recipe.output_dir) == ("lora-ga", 0.1, 0.1, "out")


def test_a_file_that_is_there_stays(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    refused = invoke(path, "--yes")
    assert refused.exit_code == 2
    assert "expected a new file, found one that is there" in refused.output
    assert path.read_text() == "mine"


def test_text_of_other_scripts_is_kept(tmp_path):
    values = answers(lambda question, offered: offered, pytest.fail, {"model": "モデル: a #1", "init": {"name": "eva"}})
    write_recipe(values, tmp_path / "r.yaml")
    assert recipes.load(tmp_path / "r.yaml").model == "モデル: a #1"
    with pytest.raises(RecipeError, match="`model` is missing"):
        write_recipe({"data": "kjv"}, tmp_path / "other.yaml")
    assert not (tmp_path / "other.yaml").exists()
