"""Whole runs on a tiny model: what is written, what is resumed, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import (
    BrokenFile,
    CheckpointError,
    DataError,
    NoTrainableTokens,
    RecipeError,
    TargetError,
    TrainingError,
)
from rankwise.train import recipe as recipes
from rankwise.train.data.trained_on import trained_on_chats
from rankwise.train.model.generation import answer
from rankwise.train.run import run
from rankwise.train.run.loading import TASKS

SILENT = Console(quiet=True)
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


@pytest.fixture
def make(tiny: Path, pairs_file: Path, tmp_path: Path):
    def make(**changes):
        values = {
            "model": str(tiny),
            "data": str(pairs_file),
            "eval_split": 8,
            "rank": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "save_steps": 3,
            "eval_steps": 4,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "run"),
        }
        return recipes.parse(values | changes)

    return make


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.draws
def test_a_run_learns_and_leaves_its_files(make, tiny):
    result = run.train(make(), SILENT)
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"]
    assert result.metrics["steps"] == 6
    assert result.curve.stat().st_size > 10_000
    metrics = json.loads((result.adapter.parent / "metrics.json").read_text())
    assert metrics == result.metrics
    card = (result.adapter / "README.md").read_text()
    assert f"base_model: {tiny}" in card
    assert "| held-out loss |" in card
    assert "learning_rate: 0.01" in card
    assert not list(result.adapter.parent.rglob("*.bin"))


def test_the_last_evaluation_is_of_what_is_saved(make):
    history = run.train(make(), SILENT).history
    assert [row["step"] for row in history if "eval_loss" in row] == [0, 4, 6]


def test_the_evaluation_before_training_is_the_pretrained_models(make, tiny):
    prepared = run.prepare(run.load(make(init="lora-ga"), SILENT), SILENT)
    with rw.disabled(prepared.model):
        plain = prepared.trainer.evaluate()["eval_loss"]
    result = run.execute(prepared, SILENT)
    assert result.metrics["eval_loss_before"] == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init": "lora-ga", "scaling": "rslora"},
        {"dropout": 0.1},
        {"optimizer": {"name": "lora-plus", "ratio": 4.0}},
        {"optimizer": "lora-pro", "init": "lora-ga"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "num_train_epochs": 2.0, "max_steps": -1},
    ],
    ids=["plain", "lora-ga", "dropout", "lora-plus", "lora-pro", "accumulation"],
)
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(make, tmp_path, changes):
    whole = run.train(make(**changes, output_dir=str(tmp_path / "whole")), SILENT)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run.train(
        make(**changes, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(checkpoint)), SILENT
    )
    expected, found = weights(whole.adapter), weights(resumed.adapter)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert resumed.metrics["steps"] == whole.metrics["steps"]


def test_resume_true_takes_the_newest_checkpoint(make, tmp_path):
    run.train(make(max_steps=6), SILENT)
    resumed = run.train(make(max_steps=8, resume_from_checkpoint=True, resume_anyway=True), SILENT)
    assert resumed.metrics["steps"] == 8
    assert [row["step"] for row in resumed.history if "loss" in row] == list(range(1, 9))


def test_resume_without_a_checkpoint_is_refused(make):
    with pytest.raises(CheckpointError, match="expected a checkpoint-N directory to resume from, found none"):
        run.train(make(resume_from_checkpoint=True), SILENT)


def test_resume_with_a_file_missing_is_refused(make, tmp_path):
    run.train(make(), SILENT)
    checkpoint = tmp_path / "run" / "checkpoint-6"
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-6: cannot resume exactly, optimizer\.pt not found"):
        run.train(make(resume_from_checkpoint=str(checkpoint), resume_anyway=True), SILENT)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("init", ["kaiming", "lora-ga"])
def test_peft_reads_the_adapter_with_equal_logits(make, tiny, init):
    result = run.train(make(init=init, dropout=0.1), SILENT)
    ours = result.prepared.model.eval()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), result.adapter).eval()
    batch = {key: result.prepared.batches[0][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=0)


def test_the_base_is_untouched_and_the_models_own_forward_is_back(make, tiny):
    model = run.train(make(init="lora-ga"), SILENT).prepared.model
    assert "forward" not in vars(model)
    clean = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    kept = rw.detach(model).state_dict()
    assert kept.keys() == clean.keys()
    assert all(torch.equal(kept[key], clean[key]) for key in clean)


def test_gradient_checkpointing_changes_nothing_but_memory(make, tmp_path):
    plain = run.train(make(output_dir=str(tmp_path / "a")), SILENT)
    recomputed = run.train(make(output_dir=str(tmp_path / "b"), gradient_checkpointing=True), SILENT)
    expected, found = weights(plain.adapter), weights(recomputed.adapter)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-4)


def test_lora_plus_trains_b_faster(make):
    trainer = run.train(
        make(optimizer={"name": "lora-plus", "ratio": 8.0}, lr_scheduler_type="constant"), SILENT
    ).prepared.trainer
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == pytest.approx([1e-2, 8e-2])


def test_the_loss_is_on_the_completion_only(make):
    batches = run.prepare(run.load(make(), SILENT), SILENT).batches
    tokens = [(batch["labels"] != -100).sum() / batch["attention_mask"].sum() for batch in batches]
    assert 0.4 < float(torch.stack(tokens).mean()) < 0.75


def test_chats_are_trained_on_the_answers_only(make, tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    path.write_text((json.dumps(chat) + "\n") * 12)
    prepared = run.prepare(run.load(make(data=str(path)), SILENT), SILENT)
    labels = prepared.batches[0]["labels"][0]
    assert prepared.tokenizer.decode(labels[labels != -100]) == "hi<eos>"


@pytest.mark.parametrize("form", ["chat", "pair"])
def test_the_end_is_trained_where_padding_is_the_same_token(make, tmp_path, tiny, form):
    """pad = eos: a collator that masked labels by their token would teach the model never to stop."""
    from transformers import AutoTokenizer

    model = tmp_path / "padded-with-eos"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    path = tmp_path / "chats.jsonl"
    answers = ["hi", "a longer answer, so that the other one is padded"]
    rows = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]}
        if form == "chat"
        else {"prompt": "hello ", "completion": answer}
        for answer in answers * 10
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = run.prepare(run.load(make(model=str(model), data=str(path)), SILENT), SILENT)
    assert prepared.tokenizer.pad_token_id == prepared.tokenizer.eos_token_id
    trained = [
        prepared.tokenizer.decode(labels[labels != -100]) for batch in prepared.batches for labels in batch["labels"]
    ]
    assert set(trained) == {f"{answer}<eos>" for answer in answers}


@pytest.fixture
def unmarked(tiny, tmp_path) -> str:
    """The tiny model with a chat template that does not mark the answers."""
    from transformers import AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "unmarked")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.save_pretrained(tmp_path / "unmarked")
    return str(tmp_path / "unmarked")


@pytest.mark.parametrize(("turns", "learnt"), [("all", "hi<eos>bye<eos>"), ("last", "bye<eos>")])
def test_chats_are_trained_on_the_answers_though_the_template_marks_none(make, tmp_path, unmarked, turns, learnt):
    path = tmp_path / "chats.jsonl"
    texts = [("user", "hello"), ("assistant", "hi"), ("user", "and now"), ("assistant", "bye")]
    chat = {"messages": [{"role": role, "content": text} for role, text in texts]}
    path.write_text((json.dumps(chat) + "\n") * 12)
    prepared = run.prepare(run.load(make(model=unmarked, data=str(path), trained_turns=turns), SILENT), SILENT)
    labels = prepared.batches[0]["labels"][0]
    assert prepared.tokenizer.decode(labels[labels != -100]) == learnt
    sample = TASKS["causal-lm"].sample(prepared.loaded, prepared.held_out)
    assert (sample.prompt, sample.reference) == ("<user>hello<assistant>hi<eos><user>and now<assistant>", "bye")


def test_an_adapter_of_chats_is_asked_through_the_template(make, tmp_path, tiny):
    path = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    path.write_text((json.dumps(chat) + "\n") * 12)
    chats = run.train(make(data=str(path), max_steps=1), SILENT).adapter
    assert answer(chats, None, "hello", max_new_tokens=2).prompt == "<user>hello<assistant>"
    assert answer(chats, None, "hello", chat=False, max_new_tokens=2).prompt == "hello"
    text = run.train(make(max_steps=1, output_dir=str(tmp_path / "text")), SILENT).adapter
    assert answer(text, None, "hello", max_new_tokens=2).prompt == "hello"
    (text / "trained_on.json").unlink()  # another library's adapter
    assert not trained_on_chats(text)
    (text / "trained_on.json").write_text('{"form": "songs"}')
    with pytest.raises(BrokenFile, match="expected a `form`, one of chats, text"):
        answer(text, None, "hello")


def test_labels_all_masked_by_truncation_are_refused(make):
    message = r"32 of 32 training samples \(100%; the first is sample 1\) have every label masked.*max_length is 5"
    with pytest.raises(NoTrainableTokens, match=message):
        run.prepare(run.load(make(max_length=5), SILENT), SILENT)


def test_labels_masked_in_some_samples_are_said(make, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "a" * (60 if i == 2 else 3), "completion": "b"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(width=500, record=True, quiet=False)
    run.prepare(run.load(make(data=str(path), eval_split=None, max_length=20), console), console)
    assert "1 of 16 training samples (6%; the first is sample 3) have every label masked" in console.export_text()


def test_a_loss_that_is_not_a_number_stops_the_run(make, tmp_path):
    prepared = run.prepare(run.load(make(), SILENT), SILENT)
    trained = rw.trainable_parameters(prepared.model)
    with torch.no_grad():
        trained[0].fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1: expected a finite loss, found nan"):
        run.execute(prepared, SILENT)


def test_an_adapter_on_the_head_is_refused(make):
    with pytest.raises(TargetError, match="lm_head: the training loss is computed from this layer's weight directly"):
        run.prepare(run.load(make(target_modules=["lm_head"]), SILENT), SILENT)


def test_a_broken_line_is_named(make, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n')
    with pytest.raises(DataError, match=r"broken\.jsonl, line 2: expected one JSON object"):
        run.prepare(run.load(make(data=str(path)), SILENT), SILENT)


@pytest.mark.draws
def test_the_command_line_from_training_to_a_merged_model(make, tiny, pairs_file, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tiny}\ndata: {pairs_file}\neval_split: 8\nmax_steps: 2\nper_device_train_batch_size: 4\n")
    out = tmp_path / "out"
    cli = CliRunner()

    planned = cli.invoke(app, ["plan", str(path), "--rank", "2"], env=WIDE)
    assert planned.exit_code == 0, planned.output
    assert "model.layers.*.self_attn.q_proj" in planned.output
    assert "1,856" in planned.output

    flags = ["--rank", "2", "--init", "lora-ga", "--output-dir", str(out), "--learning_rate", "1e-2"]
    trained = cli.invoke(app, ["train", str(path), *flags], env=WIDE)
    assert trained.exit_code == 0, trained.output
    assert "held-out loss" in trained.output

    answered = cli.invoke(app, ["generate", str(out / "adapter"), "--prompt", "say 3: "], env=WIDE)
    assert answered.exit_code == 0, answered.output
    assert "before" in answered.output and "after" in answered.output

    merged = cli.invoke(
        app, ["merge", str(out / "adapter"), "--base", str(tiny), "--out", str(tmp_path / "m")], env=WIDE
    )
    assert merged.exit_code == 0, merged.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    adapted = AutoModelForCausalLM.from_pretrained(tiny).eval()
    rw.load(adapted, out / "adapter")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)

    again = cli.invoke(app, ["merge", str(out / "adapter"), "--out", str(tmp_path / "m")], env=WIDE)
    assert again.exit_code == 2
    assert "expected a new or empty directory" in again.output


def test_the_recipe_error_names_a_field_of_the_spec(make):
    with pytest.raises(RecipeError, match="`init`"):
        make(init=3)
