"""The start by itself: `rankwise init`, its cache, and `rankwise plan --advise`."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from rankwise.cli import app

WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


@pytest.fixture
def recipe(tiny, pairs_file, tmp_path):
    values = {
        "model": str(tiny),
        "data": str(pairs_file),
        "init": "lora-ga",
        "scaling": "rslora",
        "rank": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "init_batches": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "init_cache": str(tmp_path / "gradients.safetensors"),
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rankwise(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=WIDE)


def test_init_writes_the_untrained_adapter_and_keeps_the_gradients(recipe, tmp_path):
    done = rankwise("init", recipe)
    assert done.exit_code == 0, done.output
    assert "The untrained adapter is in" in done.output
    tensors = load_file(tmp_path / "run" / "start" / "adapter_model.safetensors")
    changes = [tensors[key.replace("lora_A", "lora_B")] @ A for key, A in tensors.items() if "lora_A" in key]
    assert changes and all(not bool(change.any()) for change in changes)
    before = (tmp_path / "gradients.safetensors").stat().st_mtime_ns
    assert rankwise("train", recipe).exit_code == 0
    assert (tmp_path / "gradients.safetensors").stat().st_mtime_ns == before


def test_a_cache_of_other_settings_is_refused_before_training(recipe, tmp_path):
    assert rankwise("init", recipe).exit_code == 0
    for flags, message in ((("--init-batches", 1), "other batches"), (("--init-method", "sketch"), "other settings")):
        refused = rankwise("train", recipe, *flags)
        assert refused.exit_code == 2
        assert message in refused.output
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_cache_for_an_init_without_gradients_is_refused(recipe):
    refused = rankwise("init", recipe, "--init", "kaiming")
    assert refused.exit_code == 2
    assert "Kaiming collects no gradients" in refused.output


def test_advice_shares_ranks_out_within_the_budget(recipe, tmp_path):
    done = rankwise("plan", recipe, "--advise", "--parameters", 4000)
    assert done.exit_code == 0, done.output
    assert "capture" in done.output and "rank_pattern.yaml" in done.output
    pattern = yaml.safe_load((tmp_path / "run" / "rank_pattern.yaml").read_text())["rank_pattern"]
    assert min(pattern.values()) >= 1 and max(pattern.values()) > 1
    recipe.write_text(recipe.read_text() + yaml.safe_dump({"rank_pattern": pattern}))
    planned = rankwise("plan", recipe)
    assert planned.exit_code == 0, planned.output
    total = next(line for line in planned.output.splitlines() if line.strip().startswith("total"))
    assert int(total.split()[-1].replace(",", "")) <= 4000


def test_a_budget_below_rank_one_says_what_it_takes(recipe):
    refused = rankwise("plan", recipe, "--advise", "--parameters", 10)
    assert refused.exit_code == 2
    assert "rank 1 in all 14 layers takes" in refused.output


def test_methods_of_collecting_start_alike(recipe, tmp_path):
    starts = {}
    for method in ("exact", "sketch"):
        out = tmp_path / method
        done = rankwise("init", recipe, "--init-method", method, "--init-cache", "null", "--output-dir", out)
        assert done.exit_code == 0, done.output
        starts[method] = load_file(out / "start" / "adapter_model.safetensors")
    assert starts["exact"].keys() == starts["sketch"].keys()
    assert all(starts["sketch"][key].shape == tensor.shape for key, tensor in starts["exact"].items())
    assert any(not torch.equal(starts["sketch"][key], tensor) for key, tensor in starts["exact"].items())


def test_settings_that_transformers_refuses_are_errors_in_the_recipe(recipe):
    for flags, message in (
        (("--optim", "foo"), "foo"),
        (("--report-to", "foo"), "foo"),
        (("--max-steps", 0), "max_steps"),
        (("--resume-from-checkpoint", "nowhere"), "nowhere: no such directory"),
    ):
        refused = rankwise("train", recipe, *flags)
        assert refused.exit_code == 2, refused.output
        assert "Error" in refused.output and message in refused.output


def test_before_training_it_is_the_pretrained_model_that_is_evaluated(recipe, tmp_path):
    before = {}
    for init in ("kaiming", "lora-one"):
        done = rankwise("train", recipe, "--init", init, "--init-cache", "null", "--eval-split", 8)
        assert done.exit_code == 0, done.output
        before[init] = yaml.safe_load((tmp_path / "run" / "metrics.json").read_text())["eval_loss_before"]
    assert before["lora-one"] == before["kaiming"]


def test_a_finished_run_is_not_trained_on_by_a_resume(recipe, tmp_path):
    assert rankwise("train", recipe, "--save-steps", 2).exit_code == 0
    refused = rankwise("train", recipe, "--resume-from-checkpoint", "true")
    assert refused.exit_code == 2
    assert "holds step 2 of a run to step 2" in refused.output


def test_two_processes_through_accelerate_launch(recipe, tmp_path):
    """Each sees batches of its own, both start and stay alike, one writes."""
    # Without a GPU accelerate starts several processes only where it is told of several, or with mpirun.
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    choices = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = ["-m", "rankwise", "train", str(recipe), "--init-cache", "null"]
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, *choices, *command],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("held-out loss") <= 1
    assert run.stdout.count("opens in a browser") == 1
    metrics = yaml.safe_load((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["processes"] == 2
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
