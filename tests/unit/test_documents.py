"""What the documents show runs and is up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_s_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_tables_in_the_documents_are_those_of_the_results() -> None:
    run = subprocess.run([sys.executable, ROOT / "scripts" / "figures.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_fault_has_its_tests_and_the_table_is_up_to_date() -> None:
    script = ROOT / "scripts" / "reliability.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = re.findall(
        r"^\| (\d+) \| .* \| .+ \| \[.*\) \|$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE
    )
    assert rows == [str(number) for number in range(1, 26)]


def test_every_method_has_its_section() -> None:
    from rankwise.inits import INITS
    from rankwise.scaling import SCALINGS
    from rankwise.variants import VARIANTS

    text = (ROOT / "docs" / "methods.md").read_text()
    missing = [name for entries in (INITS, SCALINGS, VARIANTS) for name in entries if f"`{name}`" not in text]
    assert not missing
