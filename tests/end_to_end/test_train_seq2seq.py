"""`task: seq2seq` on a tiny T5, scored answers, and the recipes that come with rankwise."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import DataError, PretrainedError, RecipeError
from rankwise.train import recipe as recipes
from rankwise.train import shipped
from rankwise.train.data.hub import HUB
from rankwise.train.data.records import read_records
from rankwise.train.data.scores import matthews
from rankwise.train.model.generation import answer
from rankwise.train.model.tiny import save_tiny_t5
from rankwise.train.run import run

SILENT = Console(quiet=True)
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
ROWS = [{"prompt": f"{word} film {i}", "completion": word[0]} for i in range(20) for word in ("good", "bad")]


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-t5")
    save_tiny_t5(path)
    return path


@pytest.fixture
def make(t5: Path, tmp_path: Path):
    def make(rows=ROWS, **changes):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "model": str(t5),
            "task": "seq2seq",
            "data": str(path),
            "eval_split": 8,
            "rank": 4,
            "learning_rate": 3e-2,
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "max_new_tokens": 3,
            "output_dir": str(tmp_path / "run"),
        }
        return recipes.parse(values | changes)

    return make


@pytest.mark.draws
@pytest.mark.parametrize("init", ["kaiming", "lora-ga"])
def test_a_run_learns_to_answer_and_is_scored(make, init):
    recipe = make(init=init, max_steps=40, save_steps=40, eval_steps=40, answer_metric=["exact", "matthews"])
    result = run.train(recipe, SILENT)
    metrics = json.loads((result.adapter.parent / "metrics.json").read_text())
    assert metrics["exact_after"] > metrics["exact_before"] == 0
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    for file in (result.page, result.adapter / "README.md"):
        assert "held-out answers that are exact" in file.read_text()
    assert result.sample.after in ("g", "b")


def test_labels_end_and_the_decoder_begins_as_the_model_wants(make):
    prepared = run.check(run.load(make(), SILENT), SILENT)
    model, tokenizer = prepared.model, prepared.tokenizer
    batch = prepared.batches[0]
    assert (batch["decoder_input_ids"][:, 0] == model.config.decoder_start_token_id).all()
    labels = [row[row != -100].tolist() for row in batch["labels"]]
    assert {tokenizer.decode(row) for row in labels} == {"g<eos>", "b<eos>"}
    assert prepared.summary.samples[0][1][1]


def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(make, tmp_path):
    options = {"init": "lora-ga", "dropout": 0.1, "answer_metric": "exact", "eval_steps": 3}
    whole = run.train(make(**options, output_dir=str(tmp_path / "whole")), SILENT)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run.train(make(**options, output_dir=str(tmp_path / "b"), resume_from_checkpoint=checkpoint), SILENT)
    expected, found = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(expected[key], found[key]) for key in expected | found)


def test_accumulated_batches_are_averaged(make, tmp_path):
    """The gradient of 2 · 4 samples is that of 8: their answers are equally long."""
    norms = []
    for size, steps in ((8, 1), (4, 2)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        history = run.train(make(**changes, output_dir=str(tmp_path / str(size))), SILENT).history
        norms.append(next(row["grad_norm"] for row in history if "grad_norm" in row))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_adapter_answers_and_merges_from_its_directory(make, tmp_path):
    result = run.train(make(max_steps=30, save_steps=30), SILENT)
    said = answer(result.adapter, None, "good film 3", max_new_tokens=3)
    assert said.after == "g" != said.before
    merged = CliRunner().invoke(app, ["merge", str(result.adapter), "--out", str(tmp_path / "merged")], env=WIDE)
    assert merged.exit_code == 0, merged.output
    model, batch = T5ForConditionalGeneration.from_pretrained(tmp_path / "merged"), result.prepared.batches[0]
    with torch.no_grad():
        expected = result.prepared.model.eval()(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert json.loads((result.adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_data_and_fields_that_do_not_fit_are_refused(make, tiny):
    with pytest.raises(DataError, match=r"task is seq2seq: expected a prompt and a completion .* found the text form"):
        run.check(run.load(make([{"text": "a"}] * 12), SILENT), SILENT)
    with pytest.raises(RecipeError, match="`answer_metric`: goes with task causal-lm or seq2seq; with preference"):
        make(task="preference", answer_metric="exact", max_new_tokens=None)
    with pytest.raises(PretrainedError, match="LlamaConfig"):
        run.load(make(model=str(tiny)), SILENT)


def test_a_language_model_is_scored_too(make, tiny):
    rows = [{"prompt": f"say {i}: ", "completion": f"{i}"} for i in range(24)]
    result = run.train(make(rows, task="causal-lm", model=str(tiny), answer_metric=["number"], eval_steps=4), SILENT)
    scores = [row["eval_number"] for row in result.history if "eval_number" in row]
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)
    assert result.metrics["number_after"] == scores[-1]


def test_matthews_is_the_papers_for_two_labels():
    """(TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN))."""
    tp, tn, fp, fn = 5, 3, 2, 1
    said = ["y"] * tp + ["n"] * tn + ["y"] * fp + ["n"] * fn
    meant = ["y"] * tp + ["n"] * tn + ["n"] * fp + ["y"] * fn
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert matthews(said, meant) == pytest.approx(expected)
    assert matthews(["y"] * 4, ["y", "n"] * 2) == 0


@pytest.mark.parametrize("name", shipped.names())
def test_a_recipe_that_comes_along_runs_small(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    recipe = recipes.load(path)
    assert recipe.output_dir == f"runs/{name}"
    small = recipes.load(path, shipped.smoke(path))
    kept = ("task", "loss", "init", "scaling", "rank", "alpha", "optimizer", "lr_scheduler_type")
    assert [getattr(small, field) for field in kept] == [getattr(recipe, field) for field in kept]
    result = run.train(small, SILENT)
    assert result.metrics["steps"] == 2 and result.page.exists()


def test_what_is_absent_is_named_with_what_to_fetch(tmp_path):
    flags = ["--output-dir", str(tmp_path / "out")]
    without = CliRunner().invoke(app, ["train", "lora-ga-llama2-gsm8k", *flags], env=WIDE)
    assert without.exit_code == 2
    assert "hf download meta-llama/Llama-2-7b-hf" in " ".join(without.output.split())
    with pytest.raises(
        DataError, match=r"glue-cola: expected the data set nyu-mll/glue .*load_dataset\('nyu-mll/glue', 'cola'\)"
    ):
        read_records("glue-cola")


HUB_ROWS = {
    "glue-mnli": ({"premise": "a", "hypothesis": "b", "label": 2}, "contradiction"),
    "glue-sst2": ({"sentence": "a", "label": 1}, "positive"),
    "glue-cola": ({"sentence": "a", "label": 0}, "unacceptable"),
    "glue-qnli": ({"question": "a", "sentence": "b", "label": 1}, "not_entailment"),
    "glue-mrpc": ({"sentence1": "a", "sentence2": "b", "label": 0}, "different"),
    "metamath": ({"type": "GSM_Rephrased", "query": "a", "response": "so\n#### 4\nThe answer is: 4"}, "so\n#### 4"),
    "gsm8k": ({"question": "a", "answer": "#### 4"}, "#### 4"),
    "wizardlm": ({"instruction": "a", "output": "yes"}, "yes"),
    "code-feedback": ({"query": "a", "answer": "so\n```py\n1\n```\nand ```2```"}, "so\n```py\n1\n```"),
    "no-robots": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, None),
}


@pytest.mark.parametrize("name", HUB)
def test_data_of_the_hub_become_records(name, monkeypatch):
    row, completion = HUB_ROWS[name]
    asked = []

    def load(*names, split):
        asked.append((*names, split))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load)
    ((place, record),) = read_records(name).rows
    assert place == f"{name}, record 1" and record.get("completion") == completion
    held_out = HUB[name].splits[True]
    if held_out is None:
        with pytest.raises(DataError, match="has no held-out part"):
            read_records(name, held_out=True)
    else:
        read_records(name, held_out=True)
        assert asked[-1][-1] == held_out


def test_the_pretrained_t5_is_untouched(make, t5):
    model = rw.detach(run.train(make(max_steps=2), SILENT).prepared.model)
    clean = T5ForConditionalGeneration.from_pretrained(t5).state_dict()
    assert all(torch.equal(value, clean[key]) for key, value in model.state_dict().items())
