"""QLoRA end to end: the real model in 4 bits, a LoRA-GA start, training, the adapter on the same weights in fp32."""

import peft
import pytest
import torch
from rich.console import Console

import rankwise as rw
from rankwise.layers.kinds import base_matrix
from rankwise.train import demo
from rankwise.train.model.pretrained import load_pretrained
from rankwise.train.run import run


@pytest.mark.end_to_end
@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_a_4_bit_base_trains_from_a_lora_ga_start(tmp_path, method):
    recipe = demo.recipe(
        "LoRA-GA",
        tmp_path / "run",
        quantization="nf4",
        init_method=method,
        target_modules=["q_proj", "v_proj"],
        max_steps=3,
        warmup_steps=0,
        max_length=64,
        max_eval_samples=2,
        init_batches=1,
        per_device_train_batch_size=2,
    )
    console = Console(quiet=True)
    prepared = run.prepare(run.load(recipe, console), console)
    model, batch = prepared.model, dict(prepared.batches[0])
    with torch.no_grad():
        start = model.eval()(**batch).logits
        with rw.disabled(model):
            assert torch.equal(model(**batch).logits, start)
    result = run.execute(prepared, console)
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"] < 3

    plain, _ = load_pretrained("smollm2-135m")
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            plain.get_submodule(name).weight.data = base_matrix(module)
    rw.load(plain.eval(), result.adapter)
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        gap = (plain(**batch).logits - trained).norm() / (trained - start).norm()
    assert float(gap) < 1e-3


@pytest.mark.end_to_end
def test_peft_refuses_lora_ga_on_a_4_bit_base():
    """The comparison that docs/methods.md draws; it tells us when that changes."""
    model, _ = load_pretrained("smollm2-135m", quantization="nf4")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    ids = torch.randint(1000, (1, 16))
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        peft.preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())
        peft.get_peft_model(model, config)
