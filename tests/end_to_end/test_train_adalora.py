"""AdaLoRA through the command line's own trainer: the budget is met, and a resumed run ends in the same file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import rankwise as rw
from rankwise.train import recipe as recipes
from rankwise.train.run import run
from rankwise.train.tasks.base import spec_of


@pytest.mark.draws
def test_a_run_meets_its_budget_and_resumes(tiny: Path, pairs_file: Path, tmp_path: Path) -> None:
    def train(folder: str, **changes: Any) -> run.Result:
        values = {
            "model": str(tiny),
            "data": str(pairs_file),
            "rank": 4,
            "variant": {"name": "adalora", "delta_t": 2},
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 10,
            "save_steps": 4,
            "output_dir": str(tmp_path / folder),
        }
        return run.train(recipes.parse(values | changes), Console(quiet=True))

    whole = train("whole")
    sites = rw.plan(whole.prepared.model, spec_of(whole.prepared.recipe))
    saved = load_file(whole.adapter / "adapter_model.safetensors")
    assert sum(t.shape[0] for key, t in saved.items() if "lora_A" in key) == 4 * len(sites)
    resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    again = load_file(resumed.adapter / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], value) for key, value in saved.items())
