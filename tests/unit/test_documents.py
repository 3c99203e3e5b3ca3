"""What the documents show runs and is up to date."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rankwise as rw
from rankwise.combinations import COMBINATIONS
from rankwise.inits import INITS
from rankwise.methods import Method, resolve
from rankwise.optim import OPTIMIZERS, OptimizerMethod
from rankwise.scaling import SCALINGS
from rankwise.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_s_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_methods_that_contributing_shows_are_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and row as they are shown, with no other edit: all are attached, trained, saved and loaded together."""
    shown = re.findall(r"```python\n# (.*?)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    tables = {"INITS": INITS, "SCALINGS": SCALINGS, "VARIANTS": VARIANTS, "OPTIMIZERS": OPTIMIZERS}
    added: dict[str, str] = {}
    for place, code in shown:
        if place.startswith("src/rankwise/"):
            _add_to_module(place.removeprefix("src/").removesuffix(".py").replace("/", "."), code, monkeypatch)
        else:
            table = place.removeprefix("the row in ").partition(",")[0]
            for name, method in eval(f"{{{code}}}", {"Method": Method, "OptimizerMethod": OptimizerMethod}).items():
                monkeypatch.setitem(tables[table], name, method)
                added[table] = name
    assert added.keys() == tables.keys()
    base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    x = torch.randn(5, 6)
    spec = rw.LoRA(rank=2, init=added["INITS"], scaling=added["SCALINGS"], variant=added["VARIANTS"])
    model = rw.attach(copy.deepcopy(base), spec)
    assert torch.equal(model(x), base(x))
    assert rw.plan(base, spec).parameters == sum(p.numel() for p in rw.trainable_parameters(model))
    _step(model, torch.optim.SGD(rw.trainable_parameters(model), lr=0.1), x)
    rw.save(model, tmp_path)
    assert not torch.allclose(model(x), base(x))
    torch.testing.assert_close(rw.load(copy.deepcopy(base), tmp_path)(x), model(x))
    plain = rw.attach(copy.deepcopy(base), rw.LoRA(rank=2))
    _step(plain, resolve(OPTIMIZERS, {"name": added["OPTIMIZERS"], "beta": 0.5}, "optimizer")(plain, 0.01), x)
    assert not torch.allclose(plain(x), base(x))


def _add_to_module(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules.get(name)
    if module is None:
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    namespace = dict(vars(module))
    exec(compile(code, name, "exec"), namespace)
    for key, value in namespace.items():
        if key not in vars(module):
            monkeypatch.setattr(module, key, value, raising=False)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()


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
    assert len(rows) >= 25 and rows == [str(number) for number in range(1, len(rows) + 1)]


def test_every_combination_is_explained() -> None:
    text = (ROOT / "docs" / "adapters.md").read_text()
    assert not [name for name in COMBINATIONS if f"| `{name}` |" not in text]


def test_every_method_has_its_section() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    tables = (INITS, SCALINGS, VARIANTS, OPTIMIZERS)
    headings = "\n".join(re.findall(r"^#+ .*$", text, re.MULTILINE))
    scales = text[text.index("## Scales") : text.index("## Starts")]
    missing = [name for entries in tables for name in entries if f"`{name}`" not in headings + scales]
    assert not missing


def test_many_adapters_example() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "many_adapters.md").read_text(), re.DOTALL)
    exec(compile(block, "docs/many_adapters.md", "exec"), {})
