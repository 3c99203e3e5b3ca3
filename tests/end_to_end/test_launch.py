"""The launch files of examples/launch, on two CPU processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, Trainer

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.run import run

LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"
ACCELERATE = ("accelerate.commands.launch", "--main_process_port", "0", "--config_file", LAUNCH / "accelerate_cpu.yaml")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "command",
    [(*TORCHRUN, LAUNCH / "fsdp2.py", "--rank", "4"), (*ACCELERATE, LAUNCH / "trainer.py")],
    ids=["fsdp2", "trainer"],
)
def test_an_adapter_is_trained_by_two_processes_and_saved_whole(command, tiny, pairs_file, tmp_path):
    out = tmp_path / "out"
    options = {"--model": tiny, "--data": pairs_file, "--out": out, "--steps": 3, "--batch": 2, "--rate": 0.01}
    words = [str(word) for word in (*command, *(part for option in options.items() for part in option))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    rw.load(model, out / "adapter" if (out / "adapter").is_dir() else out)
    assert (model(ids).logits - before).abs().max().item() > 1e-3


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_recipe_refuses_to_shard_the_base_before_it_trains(sharding, tiny, pairs_file, tmp_path, monkeypatch):
    made = Trainer.create_accelerator_and_postprocess

    def shards(trainer: Trainer) -> None:
        made(trainer)
        setattr(trainer, sharding, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", shards)
    recipe = recipes.parse({"model": str(tiny), "data": str(pairs_file), "output_dir": str(tmp_path / "run")})
    with pytest.raises(RecipeError, match=r"found FSDP or DeepSpeed.*examples/launch/fsdp2\.py"):
        run.train(recipe, Console(quiet=True))


def test_every_configuration_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted(LAUNCH.glob("accelerate*.yaml"))
    assert len(files) == 5
    for path in files:
        config = load_config_from_file(str(path))
        assert config.num_processes == 2
        assert config.distributed_type.value == yaml.safe_load(path.read_text())["distributed_type"]
