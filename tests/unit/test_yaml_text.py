"""YAML that is meant to harm: a named error in little time, of recipes, arms and flags alike."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankwise.cli import app
from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.yaml_text import parse_yaml, read_yaml

SECONDS = 5.0  # the slowest takes one, alone on a machine
# A billion values in nine lines.
LAUGHS = "l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
MERGES = "m0: &m0 {k: v}\n" + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 9))

HARMFUL: dict[str, str] = {
    "a bomb of aliases": LAUGHS,
    "a bomb of merges": MERGES,
    "a value in itself": "model: &a [*a]",
    "a mapping in itself": "model: &a {b: *a}",
    "a million levels": "model: " + "[" * 500_000,
    "levels of mappings": "model: " + "{a: " * 5000 + "}" * 5000,
    "a number of many digits": "rank: " + "9" * 5000,
    "a number of base 16": "rank: 0x" + "f" * 10_000,
    "a number of base 60": "rank: 1" + ":59" * 100_000,
    "a date that is none": "model: 2026-99-99",
    "a time that is none": "model: !!timestamp x",
    "an integer that is none": "rank: !!int x",
    "a float that is none": "rank: !!float x",
    "a truth that is none": "bf16: !!bool x",
    "bytes that are none": "model: !!binary x",
    "code": "model: !!python/object/apply:os.system [touch /tmp/ran]",
    "a list as a key": "? [a]\n: b",
    "too much": "model: x\n" * 200_000,
    "a zero byte": "model: a\0b",
}


@pytest.mark.parametrize("text", HARMFUL.values(), ids=HARMFUL)
def test_what_cannot_be_read_is_a_named_error(text: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    before = time.process_time()
    with pytest.raises(RecipeError, match=str(path)) as caught:
        recipes.load(path)
    with pytest.raises(RecipeError, match="--rank-pattern"):
        recipes.flag_value("rank_pattern", text)
    assert time.process_time() - before < SECONDS
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("command", [["train"], ["plan"], ["check"], ["init"], ["study", "ranks"], ["compare"]])
def test_every_command_that_takes_a_recipe(command: list[str], tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(LAUGHS)
    result = CliRunner().invoke(app, [*command, str(tmp_path / "recipe.yaml")])
    assert (result.exit_code, "RecipeError" in result.output) == (2, True)


def test_arms(tmp_path: Path):
    (tmp_path / "arms.yaml").write_text(LAUGHS)
    with pytest.raises(RecipeError, match=r"arms\.yaml: expected YAML, found: aliases that stand for more than"):
        read_yaml(tmp_path / "arms.yaml", "")


def _binary(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        Path.mkdir,
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**11),
        _binary(b"\xff\xfem\x00"),
        _binary(b""),
    ],
    ids=["pipe", "device", "loop", "directory", "a hundred gigabytes", "utf-16", "empty"],
)
def test_files_that_are_none(make: Callable[[Path], None], tmp_path: Path):
    make(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        recipes.load(tmp_path / "recipe.yaml")


def test_aliases_that_are_meant_are_read():
    text = (
        "shared: &s {rank: 4, alpha: 8}\nfirst: {<<: *s, rank: 2}\nlist: [&x q_proj, *x]\nrate: 2e-4\n"
        "deep: [[&d {<<: *s, rank: 3}]]\nlast: {<<: *d}\n"
    )
    assert parse_yaml(text) == {
        "shared": {"rank": 4, "alpha": 8},
        "first": {"rank": 2, "alpha": 8},
        "list": ["q_proj", "q_proj"],
        "rate": 2e-4,
        "deep": [[{"rank": 3, "alpha": 8}]],
        "last": {"rank": 3, "alpha": 8},
    }


def test_the_ranks_of_a_large_mixture_of_experts_are_read():
    names = {f"^model\\.layers\\.{i}\\.mlp\\.experts\\.{j}\\.down_proj": 4 for i in range(20) for j in range(256)}
    before = time.process_time()
    read = parse_yaml("rank_pattern:\n" + "".join(f"  '{name}': 4\n" for name in names))
    assert read == {"rank_pattern": names}
    assert time.process_time() - before < SECONDS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('output_dir: "a\\0b"', "output_dir`: expected text in UTF-8 without zero bytes"),
        ('data: "\\ud800"', "data`: expected text in UTF-8 without zero bytes"),
        ('rank_pattern: {"\\ud800": 4}', "rank_pattern`: expected text in UTF-8 without zero bytes"),
        ('modules_to_save: ["a\\0"]', "modules_to_save`: expected text in UTF-8 without zero bytes"),
        ('init: {name: "pissa\\0"}', "init`: expected text in UTF-8 without zero bytes"),
        ("learning_rate: .inf", "learning_rate`: expected a finite number"),
        ("num_train_epochs: 1e999", "num_train_epochs`: expected a finite number"),
        ("init_memory: .nan", "init_memory`: expected "),
        ("max_steps: 10000000000", "max_steps`: expected less than 2147483648"),
        ("seed: 4294967296", "seed`: expected less than 4294967296"),
    ],
)
def test_values_that_no_run_can_have(line: str, message: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(f"model: m\n{'' if line.startswith('data') else 'data: d'}\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        recipes.load(tmp_path / "recipe.yaml")
    assert message in str(caught.value)
