"""Commands that need no model do not wait for the libraries of those that do."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import rankwise as rw

HEAVY = ("torch", "transformers", "trl", "datasets", "peft")
SCRIPT = f"""
import sys
from rankwise.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    print("exit code", end.code)
print("imported", [name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, and a recipe."""
    folder = tmp_path_factory.mktemp("starting")
    model = nn.Sequential(nn.Linear(8, 8))
    rw.save(rw.attach(model, rw.LoRA(rank=2, target_modules=["0"])), folder / "adapter")
    (folder / "recipe.yaml").write_text("model: smollm2-135m\ndata: kjv\n")
    return folder


@pytest.mark.parametrize(
    ("command", "exit_code", "says"),
    [
        ("--help", 0, "analyze"),
        ("--version", 0, f"rankwise {rw.__version__}"),
        ("methods", 0, "lora-ga"),
        ("inspect adapter", 0, "vLLM"),
        ("plan recipe.yaml --rank many", 2, "expected a valid integer"),
        ("plan recipe.yaml --rank 0", 2, "rank must be a positive integer"),
        ("plan recipe.yaml --init lora-gu", 2, "did you mean 'lora-ga'?"),
        ("plan recipe.yaml --optimizer lora-pru", 2, "did you mean 'lora-pro'?"),
        ("check absent.yaml", 2, "readable YAML file"),
    ],
)
def test_nothing_heavy_is_imported(folder: Path, command: str, exit_code: int, says: str):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command.split()], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert f"exit code {exit_code}" in done.stdout, done.stderr
    assert " ".join(says.split()) in " ".join((done.stdout + done.stderr).split())
    assert "imported []" in done.stdout
