"""What the pages and the notebook show runs, and names commands, flags and fields that there are."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml

from rankwise.cli import app
from rankwise.combinations import COMBINATIONS
from rankwise.inits import INITS
from rankwise.optim import OPTIMIZERS
from rankwise.scaling import SCALINGS
from rankwise.train import recipe as recipes
from rankwise.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = ("index", "your_data", "coming_from")  # pages whose Python stands alone; others show parts of a program


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_s_python_runs_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page}
    shown = blocks((ROOT / "docs" / f"{page}.md").read_text(), "python")
    assert shown
    for block in shown:
        exec(compile(block, f"{page}.md", "exec"), namespace)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "first_adapter.ipynb").read_text())
    namespace: dict[str, object] = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not kept: they would go stale"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert "best rate" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_flag_that_a_page_shows_exists(page):
    commands = typer.main.get_command(app).commands
    for line in "\n".join(blocks(page.read_text(), "sh")).replace("\\\n", " ").splitlines():
        command = re.search(r"(?:^|-m |bin/)rankwise ([a-z].*)", line)
        if command is None:
            continue
        words = shlex.split(command[1], comments=True)
        assert words[0] in commands, line
        flags = {flag for parameter in commands[words[0]].params for flag in parameter.opts}
        assert not [word for word in words[1:] if word.startswith("--") and word.partition("=")[0] not in flags], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_recipe_that_a_page_shows_is_one(page):
    for block in blocks(page.read_text(), "yaml"):
        values = yaml.safe_load(block)
        if isinstance(values, dict) and "model" in values and "data" in values:
            recipes.parse(values)


def test_every_method_says_when_to_use_it():
    text = (ROOT / "docs" / "choose.md").read_text()
    for table in (INITS, SCALINGS, VARIANTS, OPTIMIZERS, COMBINATIONS):
        assert not [name for name in table if not re.search(rf"^\| `{name}` \| .{{5,}} \|$", text, re.MULTILINE)]


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling, which builds the wheel, is not installed")
def test_a_wheel_runs_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", wheels, ROOT], check=True, capture_output=True)
    (wheel,) = wheels.glob("rankwise-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, capture_output=True)
    code = (path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.is_file())
    left_out = [path for path in code if path.suffix != ".pyc" and not (target / path).is_file()]
    assert not left_out
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(target)

    def said(*words: str) -> str:
        run = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert said("-c", "import rankwise; print(rankwise.__file__)").strip() == str(target / "rankwise" / "__init__.py")
    assert re.search(r"\d+\.\d+\.\d+", said("-m", "rankwise", "--version"))
    assert "lora-ga" in said("-m", "rankwise", "methods")
    template = "import rankwise.report.page as p; print('<html' in p.page('A run', sections=[]))"
    assert said("-c", template).strip() == "True"
