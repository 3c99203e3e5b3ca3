"""The recipe's schema and what its errors say."""

import inspect
import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch

from rankwise.errors import RecipeError, SpecError
from rankwise.optim import OPTIMIZERS
from rankwise.optim.choice import PairChoice
from rankwise.train import recipe as recipes
from rankwise.train.recipe import SECTIONS, AdapterFields, Recipe

PAIR_OPTIMIZERS = [name for name in OPTIMIZERS if name not in ("adamw", "lora-plus")]
WITH_BETAS = ("lora-pro", "polora", "scaled-adam", "loft")


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_two_lines_are_a_recipe(write):
    recipe = recipes.load(write("model: smollm2-135m\ndata: kjv\n"))
    assert recipe.learning_rate == 2e-4
    assert recipe.target_modules == "all-linear"


def test_an_unknown_key_names_the_file_and_the_nearest_field(write):
    path = write("model: m\ndata: d\nlearning_rte: 0.1\n")
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    assert str(caught.value) == f"{path}: `learning_rte` is not a field of a recipe. Did you mean `learning_rate`?"


def test_every_problem_is_named_at_once(write):
    path = write("data: d\nrank: eight\noptimizer: 16\nbf16: 1\n")
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    message = str(caught.value)
    assert "`model` is missing" in message
    assert "`rank`: expected a valid integer; found 'eight' (str)" in message
    assert "`optimizer`: expected a valid string or a valid dictionary; found 16 (int)" in message
    assert "`bf16`: expected a valid boolean; found 1 (int)" in message


def test_the_old_place_of_lora_plus_ratio_names_the_new_one(write):
    path = write("model: m\ndata: d\nlr_ratio: derived\n")
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    assert str(caught.value) == (
        f"{path}: `lr_ratio` is an option of the optimizer lora-plus; "
        "write `optimizer: {name: lora-plus, ratio: derived}`."
    )


def test_a_key_given_twice_is_refused_with_its_line(write):
    path = write("model: m\ndata: d\nrank: 8\nrank: 16\n")
    with pytest.raises(RecipeError, match="'rank' is given twice") as caught:
        recipes.load(path)
    assert str(path) in str(caught.value)
    assert "line 4" in str(caught.value)


@pytest.mark.parametrize("text", ["", "- model", "model"])
def test_what_is_not_a_mapping_is_refused(write, text):
    with pytest.raises(RecipeError, match="expected `field: value` lines"):
        recipes.load(write(text))


def test_broken_yaml_names_the_file_and_the_line(write):
    path = write("model: m\ndata: [d\n")
    with pytest.raises(RecipeError, match="expected YAML") as caught:
        recipes.load(path)
    assert str(path) in str(caught.value)
    assert "line 3" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.yaml: expected a readable YAML file"):
        recipes.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("1E3", 1e3), ("1.5e-05", 1.5e-5), (".5e1", 5.0), ("1", 1.0)]
)
def test_numbers_with_an_exponent_are_numbers(write, text, value):
    assert recipes.load(write(f"model: m\ndata: d\nlearning_rate: {text}\n")).learning_rate == value


def test_flags_win_and_are_named_as_the_command_line(write):
    path = write("model: m\ndata: d\nrank: 4\n")
    assert recipes.load(path, {"rank": 16}).rank == 16
    with pytest.raises(RecipeError, match="command line: `rank`: expected a valid integer"):
        recipes.load(path, {"rank": "many"})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rank", "16", 16),
        ("learning_rate", "2e-4", 2e-4),
        ("output_dir", "2026", "2026"),
        ("target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("init", "{name: lora-ga, gamma: 8}", {"name": "lora-ga", "gamma": 8}),
        ("max_length", "null", None),
        ("resume_from_checkpoint", "true", True),
    ],
)
def test_a_flag_reads_as_the_file_would(name, text, value):
    assert recipes.flag_value(name, text) == value


def test_a_flag_that_is_no_yaml_is_named():
    with pytest.raises(RecipeError, match="--rank-pattern: expected a YAML value"):
        recipes.flag_value("rank_pattern", "{q_proj: 4")


def test_a_value_inside_a_mapping_is_named(write):
    with pytest.raises(RecipeError, match=r"`rank_pattern\.q_proj`: expected a valid integer; found 'four'"):
        recipes.load(write("model: m\ndata: d\nrank_pattern: {q_proj: four}\n"))


def test_every_field_says_what_it_is():
    for section in SECTIONS:
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description and field.description[-1] in ".)", name


def test_the_sections_are_the_recipe():
    assert {name for section in SECTIONS for name in section.model_fields} == set(Recipe.model_fields)


def test_the_adapter_section_is_the_spec():
    import rankwise as rw

    fields = set(AdapterFields.model_fields)
    assert fields == set(rw.LoRA().to_dict())
    assert rw.LoRA.from_dict(Recipe(model="m", data="d").section(AdapterFields)) == rw.LoRA()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_that_is_left_out_is_the_optimizers_own(name):
    recipe = recipes.parse({"model": "m", "data": "d", "optimizer": {"name": name}})
    choice = OPTIMIZERS[name].cls
    assert recipe.learning_rate == OPTIMIZERS[name].learning_rate
    if issubclass(choice, PairChoice):
        assert recipe.learning_rate == inspect.signature(choice.optimizer).parameters["lr"].default
    # It stays with the recipe, and gives way to one that is named.
    assert recipes.parse(recipe.model_dump(exclude_defaults=True)).learning_rate == recipe.learning_rate
    assert recipes.parse({"model": "m", "data": "d", "optimizer": name, "learning_rate": 0.5}).learning_rate == 0.5


def test_a_field_at_fault_is_named_without_the_rate_that_would_follow_from_it():
    with pytest.raises(RecipeError) as caught:
        recipes.parse({"model": "m", "data": "d", "optimizer": 3})
    assert "learning_rate" not in str(caught.value)
    with pytest.raises(RecipeError, match="spectral"):
        recipes.parse({"model": "m", "data": "d", "optimizer": "spectrol"})


@pytest.mark.parametrize(
    ("optimizer", "variant", "says"),
    [
        ({"name": "spectral", "betta": 0.8}, "lora", r"'spectral': unknown option 'betta'.* did you mean 'beta'"),
        ({"name": "spectral", "beta": 1.8}, "lora", r"spectral: beta: expected a number in \[0, 1\), found 1.8"),
        ({"name": "spectral", "others_lr": -1}, "lora", "others_lr: expected a positive number, found -1"),
        *(
            ({"name": name, "betas": betas}, "lora", rf"'{name}': betas must be of the kind of \(0.9, 0.9")
            for name in WITH_BETAS
            for betas in (0.9, [0.9], ["a", "b"], None)
        ),
        *(
            ({"name": name, "betas": [0.9, 1.0]}, "lora", rf"{name}: betas: expected two numbers in \[0, 1\)")
            for name in WITH_BETAS
        ),
        ({"name": "lora-plus", "ratio": -1}, "lora", "lora-plus: lr_ratio .*: expected a positive number, found -1"),
        *((name, "adalora", "found AdaLoraLayer; train it with AdamW") for name in PAIR_OPTIMIZERS),
        *((name, "bottleneck", "found none; train what has none") for name in PAIR_OPTIMIZERS),
        ("lora-plus", "bottleneck", "lr_ratio: expected a layer with a pair"),
    ],
)
def test_what_does_not_go_with_the_optimizer_is_named_before_the_model_is_loaded(optimizer, variant, says) -> None:
    from rich.console import Console

    from rankwise.train.run.loading import load as load_run

    values = {"model": "no-such-model", "data": "kjv", "optimizer": optimizer, "variant": variant}
    with pytest.raises((RecipeError, SpecError), match=says):
        load_run(recipes.parse(values), Console(quiet=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_optimizer_goes_with_a_pair_and_looking_draws_no_random_number(name, variant) -> None:
    from rankwise.train.trainer.optimizer_choice import optimizer_of

    state = torch.get_rng_state()
    optimizer_of(recipes.parse({"model": "m", "data": "d", "optimizer": name, "variant": variant}))
    assert torch.equal(torch.get_rng_state(), state)


PATHS = ("model", "data", "eval_data", "init_cache", "output_dir", "resume_from_checkpoint", "beside", "reward")
NO_PATHS = {"optim", "report_to", "lr_scheduler_type", "target_modules", "exclude_modules", "layers_pattern", "loss"}
NO_PATHS |= {"init", "scaling", "variant", "optimizer"}  # names from a table


def _takes_text(annotation: object) -> bool:
    if get_origin(annotation) in (list, dict, Literal):
        return False
    return annotation is str or any(_takes_text(part) for part in get_args(annotation))


def test_every_field_that_takes_text_is_known_as_a_path_or_as_none():
    taking = {name for name, field in Recipe.model_fields.items() if _takes_text(field.annotation)}
    assert taking == {*PATHS, *NO_PATHS}


@pytest.mark.parametrize("name", PATHS)
def test_a_users_home_is_meant_in_every_path(write, monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    least = {"model": "m", "data": "d"} | ({"task": "grpo"} if name == "reward" else {})
    values = least | {name: "~/there"}
    path = write("".join(f"{field}: {value}\n" for field, value in values.items()))
    assert getattr(recipes.load(path), name) == str(tmp_path / "home" / "there")
    flags = {name: recipes.flag_value(name, "~/there")}
    assert getattr(recipes.load(write(json.dumps(least)), flags), name) == str(tmp_path / "home" / "there")
    unchanged = recipes.parse(values | {name: "./~/a/~b"})
    assert getattr(unchanged, name) == "./~/a/~b"
    with pytest.raises(RecipeError, match=rf"`{name}`: expected .*a user's home after ~.*; found '~no-such-user/run'"):
        recipes.parse(values | {name: "~no-such-user/run"})


@pytest.mark.parametrize(
    ("field", "beside"),
    [
        ("ship_steps: 4", "ship_rank: 2"),
        ("restart_rank: 4", "restart_every: 5"),
        ("rate_probe_steps: 20", "learning_rate: auto"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(tmp_path, field, beside):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: smollm2-135m\ndata: kjv\n{field}\n")
    with pytest.raises(RecipeError, match=f"`{field.split(':')[0]}`: nothing reads it here"):
        recipes.load(path)
    path.write_text(path.read_text() + beside + "\n")
    recipes.load(path)
