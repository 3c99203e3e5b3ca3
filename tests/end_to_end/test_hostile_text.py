"""Every command shows hostile text, of names, files and errors, on the terminal; the terminal obeys none of it."""

import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.cli.terminal import Terminal, visible
from rankwise.errors import RecipeError
from rankwise.train.model.pretrained import load_pretrained

pytestmark = pytest.mark.end_to_end
HOSTILE = "\x1b[2J\x9b31m\u202egpj\u2066[red]:bomb:[/nothing]"
SHOWN = r"\x1b[2J\x9b31m\u202egpj\u2066[red]:bomb:[/nothing]"
WIDE = {"COLUMNS": "1000", "TERM": "dumb", "NO_COLOR": "1"}
COLOURFUL: Any = {"width": 80, "color_system": "standard", "force_terminal": True}
TRAINING = ["--max-steps", "1", "--per-device-train-batch-size", "2", "--eval-split", "4", "--max-train-samples", "8"]


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A directory of a hostile name, with a base, data, and an adapter of a hostile model's name."""
    folder = tmp_path / HOSTILE.replace("/", "%")
    folder.mkdir()
    shutil.copytree(tiny, folder / "base")
    rows = [{"prompt": f"{HOSTILE}{i}", "completion": HOSTILE} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, _ = load_pretrained(tiny)
    rw.attach(model, rw.LoRA(rank=2))
    rw.save(model, folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": HOSTILE}))
    (folder / "arms.yaml").write_text(json.dumps({HOSTILE: {HOSTILE: 1}}))
    return folder


def _recipe(folder: Path) -> list[str]:
    return [f"--model={folder / 'base'}", f"--data={folder / 'data.jsonl'}", f"--output-dir={folder / 'run'}"]


# Command → its arguments in a hostile place: those that end well, and those that end in an error.
COMMANDS: dict[str, tuple[Callable[[Path], list[str]] | None, Callable[[Path], list[str]]]] = {
    "train": (lambda at: [*_recipe(at), *TRAINING], lambda at: [str(at / "none.yaml")]),
    "plan": (_recipe, lambda at: [*_recipe(at), f"--target-modules={json.dumps([HOSTILE])}"]),
    "check": (_recipe, lambda at: [*_recipe(at), f"--data={at / 'none.jsonl'}"]),
    "init": (_recipe, lambda at: [*_recipe(at), f"--model={at / 'none'}"]),
    "merge": (
        lambda at: [str(at / "adapter"), f"--base={at / 'base'}", f"--out={at / 'merged'}"],
        lambda at: [str(at / "adapter"), f"--out={at / 'merged'}"],  # the base that it names is none
    ),
    "squeeze": (
        lambda at: [str(at / "adapter"), f"--out={at / 'squeezed'}", "--rank=1"],
        lambda at: [str(at / "none"), f"--out={at / 'squeezed'}", "--rank=1"],
    ),
    "combine": (
        lambda at: [str(at / "adapter"), str(at / "adapter"), f"--out={at / 'combined'}"],
        lambda at: [str(at / "adapter"), f"--method={HOSTILE}", f"--out={at / 'combined'}"],
    ),
    "extract": (None, lambda at: [str(at / "none"), str(at / "base"), f"--out={at / 'extracted'}", "--rank=1"]),
    "inspect": (lambda at: [str(at / "adapter")], lambda at: [str(at / "none")]),
    "generate": (
        lambda at: [str(at / "adapter"), f"--base={at / 'base'}", f"--prompt={HOSTILE}", "--max-new-tokens=2"],
        lambda at: [str(at / "adapter"), "--prompt=x"],
    ),
    "analyze": (
        lambda at: [str(at / "adapter"), f"--base={at / 'base'}", f"--out={at / 'page.html'}"],
        lambda at: [str(at / "adapter"), f"--out={at / 'page'}"],
    ),
    "doctor": (None, lambda at: [str(at / "none")]),
    "export": (
        lambda at: [str(at / "adapter"), "--for=peft", f"--out={at / 'exported'}"],
        lambda at: [str(at / "adapter"), f"--for={HOSTILE}", f"--out={at / 'other'}"],
    ),
    "convert": (None, lambda at: [str(at / "none"), f"--out={at / 'converted'}"]),
    "push": (None, lambda at: [str(at / "adapter"), HOSTILE]),
    "new": (lambda at: [str(at / "new.yaml"), "--yes"], lambda at: [str(at / "data.jsonl"), "--yes"]),
    "serve": (None, lambda at: [str(at / "none"), f"--adapters={at / 'adapter'}"]),
    "chat": (None, lambda at: [str(at / "none")]),
    "sweep": (None, lambda at: [*_recipe(at), f"--arms={at / 'arms.yaml'}"]),
    "study": (None, lambda at: [HOSTILE, *_recipe(at)]),
    "compare": (None, lambda at: [*_recipe(at), f"--arms={at / 'arms.yaml'}"]),
    "demo": (None, lambda at: [f"--out={at}"]),
    "methods": (lambda at: [], lambda at: [HOSTILE]),
}  # fmt: skip


def _unseen(output: str) -> set[str]:
    return {letter for letter in output if unicodedata.category(letter)[0] == "C"} - {"\n"}


def test_every_command_is_here():
    assert COMMANDS.keys() == {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }


@pytest.mark.parametrize("command", [name for name, (well, _) in COMMANDS.items() if well is not None])
def test_a_command_that_ends_well(place: Path, command: str):
    well, _ = COMMANDS[command]
    assert well is not None
    result = CliRunner().invoke(app, [command, *well(place)], env=WIDE)
    assert result.exit_code == 0, result.output
    assert not _unseen(result.output)
    if command not in ("methods", "plan"):  # these say nothing of a path
        assert SHOWN.split("/")[0] in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_ends_in_an_error(place: Path, command: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise RecipeError(HOSTILE)

    monkeypatch.setattr("rankwise.train.demo.prepare", refuse)
    monkeypatch.setattr("rankwise.train.demo.load", refuse)
    result = CliRunner().invoke(app, [command, *COMMANDS[command][1](place)], env=WIDE)
    assert result.exit_code == 2, result.output
    assert not _unseen(result.output)
    assert SHOWN.split("/")[0] in result.output


def test_json_is_of_ascii_letters(place: Path):
    result = CliRunner().invoke(app, ["inspect", str(place / "adapter"), "--json"], env=WIDE)
    assert result.output.isascii() and not _unseen(result.output)
    assert json.loads(result.output)["base_model"] == HOSTILE


def test_what_libraries_write_to_standard_error_and_traces(tmp_path: Path):
    """Warnings, logs, rich's own consoles, also during a live display; and the trace of an error that is a bug."""
    program = tmp_path / "program.py"
    program.write_text(
        "import logging, sys, warnings\n"
        "from rich.console import Console\n"
        "from rankwise.cli import app\n"
        f"HOSTILE = {HOSTILE!r}\n"
        "def inspect(folder):\n"
        "    with Console(force_terminal=True).status('busy'):\n"
        "        warnings.warn(HOSTILE)\n"
        "        logging.getLogger('elsewhere').error(HOSTILE)\n"
        "        logging.getLogger('rankwise').warning(HOSTILE)\n"
        "        Console(stderr=True).print(HOSTILE, markup=False)\n"
        "        print(HOSTILE, file=sys.stderr)\n"
        "    raise KeyError(HOSTILE) from OSError(HOSTILE)\n"
        "import rankwise.inspection.inspection as inspection\n"
        "inspection.inspect = inspect\n"
        "app(['inspect', 'x'])\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env={**os.environ, **WIDE})
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.count(r"\x1b[2J") >= 6
    assert not _unseen(done.stderr)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [bold] :smile: text\n\tof lines", None),
        ("שלום עולם · नमस्ते · 你好　世界 · family 👨\u200d👩\u200d👧 · می\u200cخواهم · a\u00a0b", None),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\r\x08\x7f\x85", r"\r\x08\x7f\x85"),
        ("a\u200bb\u2028c\ufeffd\U000e0041", r"a\u200bb\u2028c\ufeffd\U000e0041"),
        ("\u061c\u200e\u200f\u202a\u2069", r"\u061c\u200e\u200f\u202a\u2069"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_is_spelt_out(text: str, shown: str | None):
    assert visible(text) == (text if shown is None else shown)


def test_styles_stay_where_they_were():
    shown = []
    for console, parts in (
        (Terminal(file=io.StringIO(), **COLOURFUL), ("a\x1bb", "c\u202e")),
        (Console(file=io.StringIO(), **COLOURFUL), (r"a\x1bb", r"c\u202e")),
    ):
        console.print(Text.assemble((parts[0], "red"), "-", (parts[1], "bold")))
        shown.append(console.file.getvalue())
    assert shown[0] == shown[1] and "31m" in shown[0]
