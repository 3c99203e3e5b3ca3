"""What the files of a checkpoint must hold, beyond being those that were written, for a run to go on from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from rankwise.errors import BrokenFile, RankwiseError
from rankwise.files import read_json, tensor_entries
from rankwise.format.state import STATE

_TRAINER_STATE = "trainer_state.json"
# What transformers does without where it is absent, so that the run would go on otherwise than it was.
_KEYS: dict[str, set[str]] = {"optimizer.pt": {"state", "param_groups"}, "scheduler.pt": set()}
_GENERATORS = {"python", "numpy", "cpu"}


def steps_done(checkpoint: Path) -> int:
    """The step that a checkpoint was written after, whatever its directory is called by now.

    Raises:
        BrokenFile: its state does not say.
    """
    path = checkpoint / _TRAINER_STATE
    step = read_json(path).get("global_step")
    if type(step) is not int or step < 0:
        raise BrokenFile(f"{path}: global_step is {step!r}; expected the number of steps that were done")
    return step


def check_contents(checkpoint: Path) -> None:
    """Refuse a checkpoint that lacks what a run needs to go on, or holds something else under its names.

    Raises:
        BrokenFile, UnsafeFile: as it says.
    """
    generators = [path.name for path in checkpoint.glob("rng_state*.pth")] or ["rng_state.pth"]
    keys = _KEYS | dict.fromkeys(generators, _GENERATORS)
    for name in (_TRAINER_STATE, STATE, *keys):
        if not (checkpoint / name).is_file():
            raise BrokenFile(
                f"{checkpoint}: cannot resume exactly, {name} not found there. Resume from another checkpoint"
            )
    steps_done(checkpoint)
    _check_trainer_state(checkpoint / _TRAINER_STATE)
    tensor_entries(checkpoint / STATE)
    for name, expected in keys.items():
        _check_pickled(checkpoint / name, expected)


def _check_pickled(path: Path, keys: set[str]) -> None:
    with loading(path), safe_globals():
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # which reads no tensor
    if not isinstance(content, dict) or not content.keys() >= keys:
        raise BrokenFile(
            f"{path}: expected {', '.join(sorted(keys)) or 'a dict'}, found another {type(content).__name__}"
        )


def _check_trainer_state(path: Path) -> None:
    content = read_json(path)
    with loading(path):
        TrainerState(**content)
    history = content.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise BrokenFile(f"{path}: log_history: expected a list of what was logged")
    for name, default in asdict(TrainerState()).items():
        if default is not None and not _is_alike(content.get(name, default), default):
            raise BrokenFile(f"{path}: {name} is {content[name]!r}; expected {type(default).__name__}")


def _is_alike(value: Any, default: Any) -> bool:
    numbers = (int, float)
    if type(default) in numbers:
        return type(value) in numbers
    return isinstance(value, type(default))


@contextmanager
def loading(source: Path) -> Iterator[None]:
    """While transformers or torch read a part of a checkpoint, which fail in many ways on one that is malformed.

    Raises:
        BrokenFile: it cannot be loaded.
    """
    try:
        yield
    except (RankwiseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = (str(error) or repr(error)).splitlines()[0]
        raise BrokenFile(
            f"{source}: cannot be resumed from, {type(error).__name__} on loading it: {found}. Resume from another "
            "checkpoint, or start anew from its adapter"
        ) from error
