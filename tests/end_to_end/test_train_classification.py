"""Whole runs of `task: classification` on a tiny BERT: the head, the accuracy, what is saved and read again."""

import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import DataError, UnsupportedAdapter
from rankwise.train import recipe as recipes
from rankwise.train.model.generation import answer
from rankwise.train.model.merged import load_base
from rankwise.train.run import run

SILENT = Console(quiet=True)
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
WORDS = {"good": ["fine", "great", "warm"], "bad": ["dull", "poor", "cold"]}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A body without a head and without a pooler, as many encoders are published."""
    path = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Sixty texts, some longer than the model has positions."""
    path = tmp_path / "reviews.jsonl"
    rows = [
        {"text": f"{WORDS[label][i % 3]} film {'x' * (i % 30)}", "label": label} for i in range(30) for label in WORDS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(bert: Path, reviews: Path, tmp_path: Path):
    def make(**changes):
        values = {
            "model": str(bert),
            "task": "classification",
            "data": str(reviews),
            "eval_split": 12,
            "rank": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "max_steps": 24,
            "save_steps": 12,
            "eval_steps": 12,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "run"),
        }
        return recipes.parse(values | changes)

    return make


@pytest.mark.draws
@pytest.mark.parametrize("init", ["kaiming", "lora-ga"])
def test_a_run_learns_and_leaves_its_files(make, init):
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    result = run.train(make(init=init), console)
    assert "Trained whole and saved beside the adapter: bert.pooler, classifier" in console.export_text()
    metrics = json.loads((result.adapter.parent / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["accuracy_after"] >= 0.75 > metrics["accuracy_before"]
    card = (result.adapter / "README.md").read_text()
    assert "| held-out accuracy |" in card and "load_base" in card
    assert json.loads((result.adapter / "labels.json").read_text()) == ["bad", "good"]
    assert result.sample.after.startswith(result.sample.reference)
    assert {"bert.pooler", "classifier"} == set(result.prepared.loaded.spec.modules_to_save)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_adapter_loads_on_a_fresh_model_here_and_in_peft(make, bert):
    result = run.train(make(init="lora-ga", max_steps=4), SILENT)
    batch = result.prepared.batches[0]
    with torch.no_grad():
        expected = result.prepared.model.eval()(**batch).logits

    def fresh():
        return AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval()

    ours = rw.load(fresh(), result.adapter)
    theirs = PeftModel.from_pretrained(fresh(), result.adapter).eval()
    again, _ = load_base(result.adapter, None)
    rw.load(again.eval(), result.adapter)
    for model in (ours, theirs, again):
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "dropout": 0.1}])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(make, tmp_path, changes):
    options = {"max_steps": 6, "save_steps": 3, "init": "lora-ga", **changes}
    whole = run.train(make(**options, output_dir=str(tmp_path / "whole")), SILENT)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = run.train(make(**options, output_dir=str(tmp_path / "b"), resume_from_checkpoint=checkpoint), SILENT)
    expected, found = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_accumulated_batches_are_averaged(make, tmp_path):
    """The model's own forward takes the number of items that it then does not divide by."""
    options = {"max_steps": 2, "eval_split": None, "dropout": 0.0, "max_grad_norm": 0.0}
    grads = []
    for steps in (1, 4):
        changes = {"gradient_accumulation_steps": steps, "output_dir": str(tmp_path / str(steps))}
        history = run.train(make(**options, **changes), SILENT).history
        grads.append(history[0]["loss"])
    assert grads[1] < 2 * grads[0]


def test_the_base_is_untouched(make, bert):
    model = rw.detach(run.train(make(max_steps=2), SILENT).prepared.model)
    clean = BertModel.from_pretrained(bert, add_pooling_layer=False).state_dict()
    kept = model.bert.state_dict()
    assert all(torch.equal(kept[key], clean[key]) for key in clean)
    assert "forward" not in vars(model)


def test_a_checkpoint_with_a_head_keeps_its_body_and_gets_the_head_it_needs(make, bert, tmp_path):
    three = BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    PreTrainedTokenizerFast.from_pretrained(bert).save_pretrained(tmp_path / "three")
    loaded = run.load(make(model=str(tmp_path / "three")), SILENT)
    assert loaded.spec.modules_to_save == ("classifier",)
    assert loaded.model.classifier.weight.shape == (2, 32)
    assert torch.equal(loaded.model.bert.pooler.dense.weight, three.bert.pooler.dense.weight)


def test_the_new_head_depends_on_the_seed_only(make):
    def head(seed):
        return run.load(make(seed=seed), SILENT).model.classifier.weight

    first = head(1)
    torch.randn(3)
    assert torch.equal(first, head(1)) and not torch.equal(first, head(2))


def test_pairs_of_texts_and_numbered_labels(make, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"text": f"a{i}", "text_pair": f"b{i}", "label": i % 3} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run.train(make(data=str(path), max_steps=2, eval_split=3), SILENT)
    assert result.prepared.model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert " | b" in result.sample.prompt


def test_what_does_not_fit_is_refused(make, reviews, pairs_file, tmp_path):
    with pytest.raises(DataError, match=r"task is classification: .* found the prompt-completion form"):
        run.load(make(data=str(pairs_file)), SILENT)
    with pytest.raises(DataError, match=r"task is causal-lm: .* Set task: classification"):
        from rankwise.train.data.dataset import load_data
        from rankwise.train.tasks.causal_lm import CausalLM

        loaded = run.load(make(), SILENT)
        CausalLM().check(loaded, load_data(make()))
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a", "label": "good"}\n' * 4)
    with pytest.raises(DataError, match="expected samples of two labels at least, found only the label good"):
        run.load(make(data=str(one)), SILENT)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a", "label": "ugly"}\n')
    with pytest.raises(DataError, match=r"labels of the training data \(bad, good\), found 'ugly'"):
        run.prepare(run.load(make(eval_data=str(other), eval_split=None), SILENT), SILENT)


@pytest.mark.draws
def test_the_command_line_from_plan_to_a_merged_model(make, bert, reviews, tmp_path):
    cli, out = CliRunner(), tmp_path / "out"
    flags = ["--model", str(bert), "--data", str(reviews), "--task", "classification", "--rank", "2"]
    planned = cli.invoke(app, ["plan", *flags], env=WIDE)
    assert planned.exit_code == 0, planned.output
    assert "Trained whole and saved beside the adapter: bert.pooler, classifier" in planned.output

    trained = cli.invoke(
        app, ["train", *flags, "--eval-split", "12", "--max-steps", "2", "--output-dir", str(out)], env=WIDE
    )
    assert trained.exit_code == 0, trained.output
    assert "held-out accuracy" in trained.output

    merged = cli.invoke(app, ["merge", str(out / "adapter"), "--out", str(tmp_path / "m")], env=WIDE)
    assert merged.exit_code == 0, merged.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    adapted, _ = load_base(out / "adapter", None)
    rw.load(adapted.eval(), out / "adapter")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)

    with pytest.raises(UnsupportedAdapter, match=r"found a classifier's \(bad, good\)"):
        answer(out / "adapter", None, "hello")
