"""The command line: help, flags from the schema, errors as messages."""

import inspect
import subprocess
import sys
from typing import get_args

import pytest
from typer.testing import CliRunner

from rankwise.cli import app
from rankwise.errors import RecipeError
from rankwise.inits import INITS
from rankwise.train.recipe import Recipe

run = CliRunner()
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def test_help_lists_the_commands():
    result = run.invoke(app, ["--help"], env=WIDE)
    assert result.exit_code == 0
    for command in ("train", "demo", "plan", "merge", "inspect", "generate", "methods"):
        assert f" {command} " in result.output


def test_every_field_of_the_recipe_is_a_flag():
    result = run.invoke(app, ["train", "--help"], env=WIDE)
    for name in Recipe.model_fields:
        assert f"--{name.replace('_', '-')}" in result.output


def test_help_does_not_wait_for_the_training_libraries():
    heavy = "{'transformers', 'trl', 'datasets', 'matplotlib', 'peft'}"
    code = f"import sys, rankwise.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mistake_is_a_message_not_a_trace(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: d\nrnak: 8\n")
    result = run.invoke(app, ["train", str(path)], env=WIDE)
    assert result.exit_code == 2
    assert "RecipeError" in result.output
    assert "Did you mean `rank`?" in result.output
    assert "Traceback" not in result.output


def test_the_trace_is_there_for_whom_it_helps():
    result = run.invoke(app, ["--traceback", "plan", "--rank", "8"], env=WIDE)
    assert isinstance(result.exception, RecipeError)
    result = run.invoke(app, ["plan", "--rank", "8"], env=WIDE | {"RANKWISE_DEBUG": "1"})
    assert isinstance(result.exception, RecipeError)


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate"])
def test_a_flag_may_be_spelt_as_the_field_is(flag):
    result = run.invoke(app, ["plan", flag, "fast"], env=WIDE)
    assert result.exit_code == 2
    assert "command line: `learning_rate`: expected a valid number or 'auto'; found 'fast' (str)" in result.output


def test_methods_lists_the_tables():
    result = run.invoke(app, ["methods"], env=WIDE)
    assert result.exit_code == 0
    for name, entry in INITS.items():
        assert name in result.output
        assert entry.paper in result.output


def test_a_users_home_is_meant_in_every_path(monkeypatch, tmp_path):
    """Every argument that is a path, of every command, is read by the one function that knows homes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = set()
    for command in app.registered_commands:
        for parameter in inspect.signature(command.callback, eval_str=True).parameters.values():
            kind, option = get_args(parameter.annotation)
            if "Path" in str(kind) or parameter.name in ("base", "batches", "fine_tuned"):
                assert str(option.parser("~/there")) == str(tmp_path / "there"), (command.callback, parameter)
                seen.add(parameter.name)
    assert seen == {"adapter", "adapters", "out", "recipe", "base", "batches", "arms", "fine_tuned", "path"}
    result = run.invoke(app, ["inspect", "~/nowhere"], env=WIDE)
    assert f"{tmp_path / 'nowhere'}: no such directory" in "".join(result.output.split("\n"))
    assert run.invoke(app, ["inspect", "~no-such-user/adapter"], env=WIDE).exit_code == 2
