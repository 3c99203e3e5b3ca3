"""Checkpoints of a run that is not there: as few bytes as a run could be resumed from."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rankwise.train.trainer.checkpoints import begin, publish

FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rankwise_state.safetensors", "trainer_state.json")


def fill(folder: Path, step: int) -> None:
    """Write what a checkpoint of a step must hold, every tensor of it the step's own."""
    generator = torch.Generator().manual_seed(step)
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.randn(20, generator=generator)}
    torch.save({"state": {0: moments}, "param_groups": [{"lr": 0.1}]}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    drawn = {"python": random.Random(step).getstate(), "numpy": np.random.RandomState(step).get_state()}
    torch.save(drawn | {"cpu": generator.get_state()}, folder / "rng_state.pth")
    save_file({"a": torch.randn(20, generator=generator)}, folder / "rankwise_state.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))


def write(run_dir: Path, step: int) -> Path:
    """Write ``checkpoint-step`` as a run does."""
    partial = begin(run_dir, step)
    fill(partial, step)
    (partial / "state").mkdir()
    (partial / "state" / "of-a-callback").write_text(str(step))
    (partial / "empty.txt").touch()
    return publish(partial, {"seed": step})
