"""model.save_pretrained and trainer.save_model of an adapted model: a PEFT directory, or a refusal by name."""

import copy
import gc
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from peft_written import IDS, SAID, llama, outputs
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from zoo import perturb

import rankwise as rw
from rankwise.adapter import task_type
from rankwise.errors import AttachError

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID]

SPECS = {
    "lora": rw.LoRA(rank=2, init="pissa", target_modules=["q_proj", "down_proj"]),
    "dora": rw.LoRA(rank=2, variant="dora", target_modules=["q_proj"]),
    "whole": rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def opened(where: Path, base: Path) -> nn.Module:
    """A base from a directory, as most have it."""
    llama().save_pretrained(base)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(base)
    return model


@pytest.mark.parametrize("name", SPECS)
def test_what_lands_is_a_peft_directory(name: str, tmp_path: Path):
    model = rw.attach(opened(tmp_path, tmp_path / "base"), SPECS[name])
    perturb(model, 0.1)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (outputs(rw.load(llama(), tmp_path / "adapter")) - expected).abs().max() <= 1e-5
    by_name = [AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))]
    if name != "dora":  # transformers' own reader drops the magnitudes, of PEFT's files too
        by_name.append(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    for again in (PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")), *by_name):
        assert (outputs(again) - expected).abs().max() <= 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(tmp_path / "base"), "CAUSAL_LM")


def test_without_an_adapter_it_is_transformers_own(tmp_path: Path):
    model = rw.attach(llama(), SPECS["whole"])
    assert "save_pretrained" in vars(model)
    rw.detach(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(llama()))


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merged_model_is_written_whole(keep_base: bool, tmp_path: Path):
    model = rw.attach(llama(), SPECS["whole"])
    perturb(model, 0.1)
    expected = outputs(model)
    rw.merge(model, keep_base=keep_base)
    model.save_pretrained(tmp_path)
    assert (outputs(AutoModelForCausalLM.from_pretrained(tmp_path)) - expected).abs().max() <= 1e-5


def test_copies_of_the_model_save_themselves(tmp_path: Path):
    model = rw.attach(llama(), SPECS["lora"])
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        perturb(twin, 0.1 + number)
        twin.save_pretrained(tmp_path / str(number))
        loaded = rw.load(llama(), tmp_path / str(number))
        assert (outputs(loaded) - outputs(twin)).abs().max() <= 1e-5
        assert (outputs(loaded) - outputs(model)).abs().max() > 1e-3


def test_the_model_goes_with_its_last_reference():
    model = rw.attach(llama(), SPECS["lora"])
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_what_is_not_done_is_refused(tmp_path: Path):
    model = rw.attach(llama(), SPECS["lora"])
    for option in ({"push_to_hub": True}, {"distributed_checkpoint": True}):
        with pytest.raises(AttachError, match=rf"save_pretrained\({min(option)}=...\): only the adapter"):
            model.save_pretrained(tmp_path / "a", **option)
    rw.attach(model, SPECS["whole"], name="second")
    rw.activate(model, ["default", "second"])
    with pytest.raises(AttachError, match="name one adapter: 2 are active"):
        model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index % 2], "labels": IDS[index % 2]}


def _trained(folder: Path, spec: rw.LoRA, steps: int, resume: bool = False, **fields: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        lr_scheduler_type="constant", disable_tqdm=True, use_cpu=True, seed=3, **fields,
    )  # fmt: skip
    trainer = Trainer(rw.attach(llama(), spec), arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


@pytest.mark.parametrize("name", SPECS)
def test_trainer_saves_resumes_and_ends_in_a_peft_directory(name: str, tmp_path: Path):
    whole = _trained(tmp_path / "run", SPECS[name], 4)
    expected = outputs(whole.model)
    resumed = _trained(tmp_path / "run", SPECS[name], 4, resume=True)
    assert torch.equal(outputs(resumed.model), expected)
    resumed.save_model(str(tmp_path / "end"))
    for folder in (tmp_path / "end", tmp_path / "run" / "checkpoint-4"):
        assert (outputs(PeftModel.from_pretrained(llama(), str(folder))) - expected).abs().max() <= 1e-5
        assert (outputs(rw.load(llama(), folder)) - expected).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------ the base and its task


def test_a_classifier_opens_by_its_task(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    spec = rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["score"])
    model = rw.attach(copy.deepcopy(base), spec)
    perturb(model, 0.1)
    rw.save(model, tmp_path / "adapter")
    peft = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter"), num_labels=3)
    assert (outputs(peft) - outputs(model)).abs().max() <= 1e-5
    assert (outputs(rw.load(copy.deepcopy(base), tmp_path / "adapter")) - outputs(model)).abs().max() <= 1e-5
    # Without a head in the file PEFT would look for one, so the task goes unsaid.
    headless = rw.attach(copy.deepcopy(base), rw.LoRA(rank=2, target_modules=["q_proj", "score"]))
    perturb(headless, 0.1)
    rw.save(headless, tmp_path / "headless")
    assert json.loads((tmp_path / "headless" / "adapter_config.json").read_text())["task_type"] is None
    peft = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "headless"))
    assert (outputs(peft) - outputs(headless)).abs().max() <= 1e-5


def test_task_types():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    small = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert task_type(t5, ()) == "SEQ_2_SEQ_LM"
    assert task_type(LlamaForCausalLM(small), ()) == "CAUSAL_LM"
    assert task_type(LlamaModel(small), ()) is None and task_type(nn.Linear(2, 2), ()) is None
