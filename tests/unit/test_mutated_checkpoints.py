"""Adapter directories spoilt at random, through load and inspect: an error from the tree or an adapter, in little time.

The model is then as it was, or carries finite tensors that it can run with.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.checkpoint_directory import NAMES, packed, sound_directories, unpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import fingerprint, zoo_and_inputs

import rankwise as rw
from rankwise.errors import RankwiseError
from rankwise.inspection.inspection import inspect

SECONDS = 5.0  # for one directory; a pattern may take two


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sound_directories(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all examples: each writes it anew."""
    return tmp_path_factory.mktemp("spoilt")


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 8, 10**9, 10**400, 2**63, -(2**62), 0.5, -0.0, float("nan"), float("inf"), "", "8",
    "linear", "LORA", "ADALORA", "RANKWISE_BOTTLENECK", "../..", "(a+)+$", "\x1b[2J", "é", [], [[]], ["linear"], [1],
    {}, {"linear": 1}, {"(": 2}, {"linear": "x"}, [0, 0], [2**40, 2], ["a"] * 50, {"dtype": "F32"}, "F16", "I64",
    "BOOL",
]  # fmt: skip

places = st.lists(st.integers(0, 30), min_size=1, max_size=4)


def _change(found: Any, place: list[int], change: Callable[[Any, Any], None]) -> None:
    """Follow a path of numbers down into JSON and change what lies there."""
    keys = list(found) if isinstance(found, dict) else list(range(len(found)))
    if keys:
        key = keys[place[0] % len(keys)]
        if place[1:] and isinstance(found[key], dict | list) and found[key]:
            _change(found[key], place[1:], change)
        else:
            change(found, key)


def _replace(value: Any) -> Callable[[Any, Any], None]:
    def change(found: Any, key: Any) -> None:
        found[key] = value

    return change


def _delete(found: Any, key: Any) -> None:
    del found[key]


def _rename(name: str) -> Callable[[Any, Any], None]:
    def change(found: Any, key: Any) -> None:
        if isinstance(found, dict):
            found[name if name not in found else f"{name}.{len(found)}"] = found.pop(key)

    return change


json_changes = st.one_of(
    st.sampled_from(VALUES).map(_replace),
    st.just(_delete),
    st.sampled_from(["linear", "base_model.model.linear.lora_B.weight", "x", "", "auto_map", "wide.weight"]).map(
        _rename
    ),
)


@given(st.data())
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_values_of_the_configuration_and_of_the_header(sound: list[Path], folder: Path, data: st.DataObject):
    _copy(data.draw(st.sampled_from(sound)), folder)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(NAMES))
        path, place, change = folder / name, data.draw(places), data.draw(json_changes)
        if not path.is_file():
            continue
        content = path.read_bytes()
        start = 8 if name == NAMES[1] else 0
        end = 8 + int.from_bytes(content[:8], "little") if start else len(content)
        found = json.loads(content[start:end])
        _change(found, place, change)
        text = json.dumps(found).encode()
        path.write_bytes((len(text).to_bytes(8, "little") + text if start else text) + content[end:])
    _check(folder)


@given(st.data())
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_bytes(sound: list[Path], folder: Path, data: st.DataObject):
    content = bytearray(packed(data.draw(st.sampled_from(sound))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        length = data.draw(st.integers(0, 64))
        match data.draw(st.sampled_from(["flip", "truncate", "delete", "repeat", "insert"])):
            case "flip" if content:
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "truncate":
                del content[at:]
            case "delete":
                del content[at : at + length]
            case "repeat":
                content[at:at] = content[at : at + length]
            case _:
                content[at:at] = data.draw(st.binary(max_size=16))
    unpack(bytes(content), folder)
    _check(folder)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_files_that_are_absent_swapped_or_from_another_adapter(sound: list[Path], folder: Path, data: st.DataObject):
    for name in NAMES:
        source = data.draw(st.sampled_from([None, *(path / other for path in sound for other in (name, *NAMES))]))
        (folder / name).unlink(missing_ok=True)
        if source is not None and source.is_file():
            shutil.copyfile(source, folder / name)
    _check(folder)


def _copy(source: Path, folder: Path) -> None:
    unpack(packed(source), folder)


def _models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        zoo_and_inputs(names=["linear", "wide", "conv2d", "conv2d_grouped", "embedding"])[0],
        nn.Sequential(nn.Linear(4, 4)),
    ]


def _check(folder: Path) -> None:
    began = time.process_time()
    found = inspect(folder)
    json.dumps(found.to_dict(), allow_nan=False)
    loaded = False
    for model in _models():
        before = fingerprint(model)
        try:
            rw.load(model, folder)
        except RankwiseError as error:
            assert str(error)
            assert fingerprint(model) == before
        else:
            loaded = True
            assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in model.state_dict().values())
            rw.detach(model)
            assert fingerprint(model) == before
    assert not (loaded and found.problems), found.problems
    assert time.process_time() - began < SECONDS
