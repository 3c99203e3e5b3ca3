"""One short run on the real model and the real text."""

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from rankwise.train import demo
from rankwise.train.model.pretrained import load_pretrained
from rankwise.train.run import run


@pytest.mark.draws
@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_demos_recipe_learns_and_peft_agrees(tmp_path):
    recipe = demo.recipe(
        "LoRA-GA",
        tmp_path / "run",
        max_steps=3,
        warmup_steps=0,
        max_length=96,
        max_eval_samples=2,
        init_batches=1,
        per_device_train_batch_size=2,
    )
    result = run.train(recipe, Console(quiet=True))
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"] < 3
    assert result.sample is not None and result.sample.before and result.sample.after

    model, _ = load_pretrained("smollm2-135m")
    theirs = PeftModel.from_pretrained(model, result.adapter).eval()
    ours = result.prepared.model.eval()
    batch = {key: result.prepared.batches[0][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-4, rtol=0)


def test_the_demos_methods_are_recipes(tmp_path):
    for method in demo.METHODS:
        assert demo.recipe(method, tmp_path).data == "kjv"
