"""The memory that is planned from a configuration is what a real step of the same shapes holds."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.run.memory import LiveBytes, plan_memory


def recipe(tiny, **changes):
    values = {"model": str(tiny), "data": "kjv", "per_device_train_batch_size": 3, "max_length": 40, "rank": 4}
    return recipes.parse(values | changes)


def measured(tiny, **changes):
    """What a step with the real adapter holds, of real tensors."""
    checkpointing = changes.pop("gradient_checkpointing", False)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    rw.attach(model, rw.LoRA(rank=4, **changes))
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    ids = torch.zeros(3, 40, dtype=torch.long)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return live.peak


@pytest.mark.parametrize("changes", [{}, {"init": "pissa"}, {"gradient_checkpointing": True}], ids=str)
def test_a_step_holds_what_was_planned(tiny, changes):
    planned = plan_memory(recipe(tiny, **changes)).step
    assert planned == pytest.approx(measured(tiny, **changes), rel=0.1)


def test_weights_and_moments_are_counted(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    memory = plan_memory(recipe(tiny))
    trained = rw.plan(model, rw.LoRA(rank=4)).parameters
    assert memory.base == sum(p.nbytes for p in model.parameters())
    assert (memory.adapter, memory.optimizer) == (4 * trained, 12 * trained)
    assert plan_memory(recipe(tiny, init="pissa")).adapter == 8 * trained


def test_what_it_grows_with(tiny):
    base = plan_memory(recipe(tiny))
    assert base.evaluation == 0
    assert plan_memory(recipe(tiny, eval_split=8)).evaluation > 0
    assert plan_memory(recipe(tiny, per_device_train_batch_size=6)).step == pytest.approx(2 * base.step, rel=0.05)
    assert plan_memory(recipe(tiny, quantization="nf4")).base < base.base
    assert plan_memory(recipe(tiny, dtype="bfloat16")).base == base.base // 2


def test_without_a_longest_sample_there_is_no_plan(tiny):
    with pytest.raises(RecipeError, match="`max_length`: expected a number"):
        plan_memory(recipe(tiny, max_length=None))


def test_on_the_command_line(tiny):
    done = CliRunner().invoke(app, ["plan", "--memory", "--model", str(tiny), "--data", "kjv"])
    assert done.exit_code == 0, done.output
    assert "in all, beside the process's own" in done.output
