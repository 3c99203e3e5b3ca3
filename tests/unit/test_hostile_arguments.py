"""What is typed, and what lies beside an adapter: names that no file can have, bytes that are no text, odd records."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.train.analyze import _logged

run = CliRunner()
NAMES = {"too long": "a" * 300, "too deep": "/a" * 3000, "bytes that are no text": "a\udcff"}
COMMANDS = {
    "train": ["NAME"],
    "check": ["--model=m", "--data=d", "--output-dir=NAME"],
    "plan": ["--model=NAME", "--data=d"],
    "init": ["--model=m", "--data=NAME"],
    "merge": ["NAME", "--out=x"],
    "squeeze": ["x", "--out=NAME"],
    "combine": ["x", "NAME", "--out=x"],
    "extract": ["x", "NAME", "--out=x"],
    "inspect": ["NAME"],
    "generate": ["x", "--base=NAME", "--prompt=x"],
    "analyze": ["x", "--out=NAME.html"],
    "study": ["ranks", "--model=m", "--data=d", "--out=NAME"],
    "compare": ["--model=m", "--data=d", "--arms=NAME"],
    "demo": ["--out=NAME"],
    "serve": ["x", "--adapters=NAME"],
    "chat": ["name=NAME"],
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_no_file_can_have(command: str, name: str):
    result = run.invoke(app, [command, *(argument.replace("NAME", name) for argument in COMMANDS[command])])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output


def test_a_prompt_that_is_no_text():
    result = run.invoke(app, ["generate", "x", "--prompt=\udcff"])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output


@pytest.mark.parametrize("command", [["compare"], ["study", "ranks"], ["analyze", "no-such-adapter"]])
def test_a_place_for_output_may_be_left_out(command: list[str]):
    flags = ["--model=no-such-model", "--data=no-such.jsonl"] if command[0] != "analyze" else []
    result = run.invoke(app, [*command, *flags])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output


def test_data_of_a_name_that_is_no_yaml():
    from rankwise.train.recipe import flag_value

    assert flag_value("data", "a\x1b.jsonl") == "a\x1b.jsonl"
    assert flag_value("data", "[a.jsonl, b.jsonl]") == ["a.jsonl", "b.jsonl"]


def test_an_optimizer_whose_name_is_none():
    result = run.invoke(app, ["plan", "--model=m", "--data=d", "--optimizer={name: [1]}"])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output


SOUND = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0, "epoch": 1}]
ROWS: list[Any] = [
    [5], [[]], {"a": 1}, "text", None, [{"step": "x", "loss": 1}], [{"step": None, "loss": 1}], [{"loss": 1}],
    [{"step": float("inf"), "loss": 1}],
    [{"step": 1, "loss": "x"}], [{"step": 1, "eval_loss": [1]}],
]  # fmt: skip


@pytest.mark.parametrize("rows", [SOUND, *ROWS], ids=str)
def test_a_record_of_a_run_beside_an_adapter_is_read_only_where_it_is_one(tmp_path: Path, rows: Any):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    rw.attach(model, rw.LoRA(rank=1, target_modules=["0"]))
    rw.save(model, tmp_path / "adapter")
    digest = sha256((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    record = {"adapters": [{"files": {"adapter_model.safetensors": digest}}], "runs": {"run": rows}}
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert _logged(tmp_path / "adapter") == (SOUND if rows is SOUND else [])
    shutil.move(tmp_path / "report.json", tmp_path / "elsewhere.json")
    (tmp_path / "report.json").symlink_to(tmp_path.parent / "elsewhere.json")
    assert _logged(tmp_path / "adapter") == []
