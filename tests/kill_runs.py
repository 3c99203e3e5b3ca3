"""Trains a tiny model in processes that are killed, or whose disk fills up, and compares what they leave bit for bit.

A program of its own: it imports everything once and forks a process for each attempt::

    python tests/kill_runs.py --kills 60 --seed 0 --work DIR [--faults halfway full]

prints one JSON object with what was tried and what was found. Any difference ends it with an error. Only the drawing of
the loss curve is left out of the runs.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama, write_pairs
from tqdm import tqdm

from rankwise.errors import CheckpointError
from rankwise.train import recipe as recipes
from rankwise.train.run import run
from rankwise.train.trainer import checkpoints
from rankwise.train.trainer.trainer import RESULTS, AdapterTrainer

SILENT = Console(quiet=True)
STEPS = 8
# With dropout and accumulated batches, so that data position and random numbers count; a non-zero start; AdaLoRA; pairs
# that start anew and are squeezed on the way.
RECIPES: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.1, "gradient_accumulation_steps": 2},
    "lora-ga": {"init": "lora-ga", "init_batches": 2, "save_total_limit": 2, "dropout": 0.1},
    "adalora": {"variant": {"name": "adalora", "delta_t": 2}, "dropout": 0.1},
    "reshaped": {
        "restart_every": 2, "ship_rank": 2, "ship_steps": 3, "init": "lora-ga", "init_batches": 2, "dropout": 0.1
    },
}  # fmt: skip
# All that a resumed run reads. The rest holds times, or is made of these.
COMPARED = (
    "rankwise_state.safetensors",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)
KILLS_OF_A_RUN = 12  # then it is left alone, so that a machine on which an attempt gets nowhere still ends its runs
FAULTS = {"before": 1, "halfway": 2, "full": 3}  # killed before an operation, halfway through it, disk full from it on


class Work:
    """The tiny model, its data, and an uninterrupted run of each recipe to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir(parents=True)
        save_tiny_llama(folder / "model")
        write_pairs(folder / "pairs.jsonl")
        self.seconds: dict[str, float] = {}
        for name in RECIPES:
            begun = time.monotonic()
            child = forked(lambda name=name: self.train(name, self.reference(name), save_total_limit=None))
            assert finished(child) == 0, f"{name}: the uninterrupted run failed"
            self.seconds[name] = time.monotonic() - begun

    def reference(self, name: str) -> Path:
        return self.folder / f"whole-{name}"

    def train(self, name: str, output_dir: Path, **changes: Any) -> None:
        """A run, from its newest valid checkpoint if it has one."""
        values = {
            "model": str(self.folder / "model"),
            "data": str(self.folder / "pairs.jsonl"),
            "rank": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": STEPS,
            "save_steps": 1,
            "logging_steps": 1,
            "output_dir": str(output_dir),
            "resume_from_checkpoint": bool(checkpoints.checkpoints(output_dir)),
        }
        # The pictures, most of the time of so small a run, write no checkpoint.
        run.save_loss_curve = run._write_page = lambda *_: None
        run.train(recipes.parse(values | RECIPES[name] | changes), SILENT)

    def check(self, name: str, output_dir: Path) -> list[Path]:
        """Every checkpoint there is whole and, bit for bit, that of the uninterrupted run. Returns them."""
        found = checkpoints.checkpoints(output_dir)
        for checkpoint in found:
            checkpoints.check_directory(checkpoint)
            same(checkpoint, self.reference(name) / checkpoint.name, COMPARED)
        return found

    def check_end(self, name: str, output_dir: Path) -> None:
        same(output_dir / "adapter", self.reference(name) / "adapter", ("adapter_model.safetensors",))


def same(found: Path, expected: Path, names: tuple[str, ...]) -> None:
    for file in names:
        assert content(found / file) == content(expected / file), f"{found / file} differs from {expected}"


def content(path: Path) -> Any:
    """Every bit of a file; of safetensors its tensors' bits, as it writes its metadata in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    return {key: (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for key, t in load_file(path).items()}


def forked(action: Callable[[], None]) -> int:
    """Start the action in a child; returns its process id."""
    tqdm.set_lock(threading.RLock())  # its own is shared by all processes, and a child may be killed that holds it
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        action()
        status = 0
    except BaseException:  # noqa: BLE001 - a child must end here, whatever happened in it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def finished(child: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(child: int, seconds: float) -> bool:
    """Whether a child had to be killed; an attempt that fails by itself ends the program."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"a resumed run failed: {os.waitstatus_to_exitcode(status)}"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return finished(child) == -signal.SIGKILL


def kill_at_random(work: Work, kills: int, rng: random.Random) -> dict[str, Any]:
    """Runs that are killed again and again before they may get through; after each kill all is compared."""
    done, runs, compared, lost, bytes_lost, between = 0, 0, 0, 0, 0, 0
    for name in itertools.cycle(RECIPES):
        if done >= kills:
            break
        folder = work.folder / f"killed-{runs}"
        newest, seen = 0, set[str]()
        for _ in range(min(KILLS_OF_A_RUN, kills - done)):
            delay = rng.uniform(0, 0.6 * work.seconds[name])
            killed = killed_after(forked(lambda name=name, folder=folder: work.train(name, folder)), delay)
            if not killed or (folder / RESULTS).exists():  # killed on its way out: that run is through
                break
            done += 1
            left = work.check(name, folder)
            compared += len(left)
            between += (folder / checkpoints.PARTIAL).exists()  # it is there only meanwhile
            steps = [checkpoints.step_of(path) for path in left]
            gone = seen - {path.name for path in left}
            if "save_total_limit" in RECIPES[name]:
                gone = {f"checkpoint-{newest}"} if max(steps, default=0) < newest else set()
            lost += len(gone)
            bytes_lost += sum(size(work.reference(name) / checkpoint) for checkpoint in gone)
            newest, seen = max(steps, default=0), {path.name for path in left}
        else:
            assert finished(forked(lambda name=name, folder=folder: work.train(name, folder))) == 0
        work.check(name, folder)
        work.check_end(name, folder)
        shutil.rmtree(folder)
        runs += 1
    return {
        "kills": done,
        "kills while a checkpoint was being written": between,
        "runs resumed to their end, bit for bit": runs,
        "checkpoints compared bit for bit": compared,
        "checkpoints lost": lost,
        "bytes lost": bytes_lost,
    }


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fault_at_every_operation(work: Work, faults: list[str]) -> dict[str, Any]:
    """One process for each operation on the disk that saving the second checkpoint takes, and each fault."""
    name, folder = "lora-ga", work.folder / "faults"
    report = work.folder / "faults.json"

    def train() -> None:
        plain = AdapterTrainer._save_checkpoint

        def save(trainer: AdapterTrainer, model: Any, trial: Any) -> None:
            if trainer.state.global_step == 3:  # the first that removes an older one
                tried = {fault: _each_operation(work, trainer, plain, fault) for fault in faults}
                report.write_text(json.dumps(tried))
            plain(trainer, model, trial)

        AdapterTrainer._save_checkpoint = save
        work.train(name, folder)

    assert finished(forked(train)) == 0
    work.check_end(name, folder)
    resumed = sorted(work.folder.glob("after-*"))
    for copy in resumed:
        assert finished(forked(lambda copy=copy: work.train(name, copy))) == 0
        work.check(name, copy)
        work.check_end(name, copy)
    return {
        "faults": json.loads(report.read_text()),
        "resumed after a fault to the end, bit for bit": len(resumed),
    }


def _each_operation(work: Work, trainer: AdapterTrainer, save: Callable[..., None], fault: str) -> int:
    """Save with the fault at the first operation, the second ..., each in a process of its own; returns how many."""
    folder = Path(trainer.args.output_dir)
    kept = work.folder / "kept"
    shutil.copytree(folder, kept)
    drawn = random.getstate()
    for operation in itertools.count(1):
        child = forked(lambda operation=operation: _save_with_fault(trainer, save, operation, FAULTS[fault], drawn))
        status = finished(child)
        if status == UNTOUCHED:
            _put_back(kept, folder)
            shutil.rmtree(kept)
            return operation - 1
        assert status in ((REFUSED, 0) if fault == "full" else (-signal.SIGKILL,)), (operation, status)
        left = [checkpoint.name for checkpoint in work.check("lora-ga", folder)]
        assert left in (
            ["checkpoint-2", "checkpoint-1"],
            ["checkpoint-3", "checkpoint-2", "checkpoint-1"],
            ["checkpoint-3", "checkpoint-2"],
        ), left
        if operation % 40 == 20:
            shutil.copytree(folder, work.folder / f"after-{fault}-{operation}")
        _put_back(kept, folder)
    raise AssertionError


UNTOUCHED, REFUSED = 11, 12


def _save_with_fault(
    trainer: AdapterTrainer, save: Callable[..., None], operation: int, fault: int, drawn: tuple[Any, ...]
) -> None:
    random.setstate(drawn)  # Python seeds it anew in a child
    disk = ctypes.CDLL(None)  # tests/faulty_disk.c, which is preloaded
    disk.faulty_disk_operations.restype = ctypes.c_long
    disk.arm_faulty_disk(ctypes.c_long(operation), fault)
    refused = None
    try:
        save(trainer, trainer.model, None)
    except CheckpointError as error:
        refused = str(error)
    done = disk.faulty_disk_operations()
    disk.arm_faulty_disk(ctypes.c_long(0), 0)  # what is still to be written is this program's own
    assert refused is None or "could not be written" in refused, refused
    os._exit(UNTOUCHED if done < operation else 0 if refused is None else REFUSED)


def _put_back(kept: Path, folder: Path) -> None:
    for path in [*folder.glob("checkpoint-*"), folder / checkpoints.PARTIAL, folder / ".removed"]:
        if path.exists():
            shutil.rmtree(path)
    for path in kept.glob("checkpoint-*"):
        shutil.copytree(path, folder / path.name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--faults", nargs="*", choices=FAULTS, help="at every operation; preload tests/faulty_disk.c")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the children need not walk through what is imported
    work = Work(options.work)
    begun = time.monotonic()
    found = kill_at_random(work, options.kills, random.Random(options.seed)) if options.kills else {}
    if options.faults:
        found |= fault_at_every_operation(work, options.faults)
    print(json.dumps({"seed": options.seed, **found, "seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    main()
