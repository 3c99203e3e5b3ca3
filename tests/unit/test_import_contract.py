"""Imports run one way, the core needs torch, safetensors and numpy only, and no part grows past its budget of lines."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_order import FILE_LINES, HEART, HEART_LINES, LEVEL, TRAIN_ROOMS, code_lines

import rankwise

SRC = Path(rankwise.__file__).parent

CORE_NEEDS = sys.stdlib_module_names | {"rankwise", "torch", "safetensors", "numpy"}
NOT_IN_CORE = (
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "pydantic",
    "typer",
    "rich",
    "yaml",
    "jaxtyping",
)


def component(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


CORE = [path for path in sorted(SRC.rglob("*.py")) if LEVEL.get(component(path), 0) < LEVEL["report"]]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything imported, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_component(name: str) -> str:
    """`rankwise.inits.base.Init` → `inits`; `rankwise`, or a name that it gathers → `__init__`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_run_one_way(path: Path) -> None:
    here = component(path)
    assert here in LEVEL, f"{path}: a new module: give it its place in LAYERS"
    for line, name in imports(path):
        there = imported_component(name)
        if name.split(".")[0] == "rankwise" and there != here:
            assert LEVEL[there] < LEVEL[here], f"{path}:{line}: {here} may not import {name}"


@pytest.mark.parametrize("room", TRAIN_ROOMS)
def test_rooms_of_train_import_one_way(room: str) -> None:
    above = {f"rankwise.train.{other}" for other in TRAIN_ROOMS[TRAIN_ROOMS.index(room) + 1 :]}
    above |= {f"rankwise.train.{path.stem}" for path in (SRC / "train").glob("*.py") if path.stem not in TRAIN_ROOMS}
    for path in [SRC / f"train/{room}.py"] if room == "recipe" else (SRC / "train" / room).glob("*.py"):
        for line, name in imports(path):
            assert ".".join(name.split(".")[:3]) not in above, f"{path}:{line}: {room} may not import {name}"


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(SRC)))
def test_core_imports_only_what_it_declares(path: Path) -> None:
    # Shapes are checked where jaxtyping is there, under pytest, and are plain annotations elsewhere.
    allowed = CORE_NEEDS | ({"jaxtyping"} if path.name == "shapes.py" else set())
    foreign = [f"{path}:{line}: {name}" for line, name in imports(path) if name.split(".")[0] not in allowed]
    assert not foreign, "the core needs torch, safetensors and numpy only"


def test_core_works_with_nothing_else_installed() -> None:
    modules = [".".join(("rankwise", *path.relative_to(SRC).with_suffix("").parts)) for path in CORE]
    script = f"import sys, importlib\nsys.modules.update(dict.fromkeys({NOT_IN_CORE!r}))\n" + "".join(
        f"importlib.import_module({name.removesuffix('.__init__')!r})\n" for name in modules
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_no_file_is_too_long(path: Path) -> None:
    assert code_lines(path) <= FILE_LINES


def is_in_heart(path: Path) -> bool:
    name = ".".join(path.relative_to(SRC).with_suffix("").parts)
    return any(name == part or name.startswith(f"{part}.") for part in HEART)


def test_the_heart_is_small() -> None:
    lines = {path: code_lines(path) for path in SRC.rglob("*.py") if is_in_heart(path)}
    assert sum(lines.values()) <= HEART_LINES, sorted(lines.items(), key=lambda item: -item[1])[:10]
