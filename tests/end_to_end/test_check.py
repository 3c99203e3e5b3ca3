"""What is looked at before the first step, by `rankwise check` and by every run."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import DataError, NoGradient, TrainingError
from rankwise.train import recipe as recipes
from rankwise.train.data import preflight
from rankwise.train.run import run
from rankwise.train.run.trial_step import try_step

SILENT = Console(quiet=True)
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


@pytest.fixture
def make(tiny: Path, pairs_file: Path, tmp_path: Path):
    def make(**changes):
        values = {
            "model": str(tiny), "data": str(pairs_file), "rank": 4, "per_device_train_batch_size": 4, "max_steps": 2,
            "logging_steps": 1, "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        return recipes.parse(values | changes)

    return make


@pytest.fixture
def changed_model(tiny: Path, tmp_path: Path):
    """A copy of the tiny model after something was done to it."""

    def changed(do) -> str:
        model, tokenizer = LlamaForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
        with torch.no_grad():
            do(model, tokenizer)
        model.save_pretrained(tmp_path / "changed")
        tokenizer.save_pretrained(tmp_path / "changed")
        return str(tmp_path / "changed")

    return changed


def test_check_shows_what_is_trained_and_trains_nothing(make, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make().model_dump(exclude_defaults=True)))
    done = CliRunner().invoke(app, ["check", str(recipe)], env=WIDE)
    assert done.exit_code == 0, done.output
    for shown in ("say 0: 0 is what I say<eos>", "40", "in 40 samples", "every gradient finite", "GiB", "Ready"):
        assert shown in done.output
    assert not list((tmp_path / "run").glob("*"))


def test_trained_and_masked_pieces_are_told_apart(make):
    prepared = run.prepare(run.load(make(), SILENT), SILENT)
    assert prepared.summary.samples[0] == [("say 0: ", False), ("0 is what I say<eos>", True)]


def test_a_step_leaves_everything_as_it_was(make):
    prepared = run.prepare(run.load(make(dropout=0.5), SILENT), SILENT)
    model, before = prepared.model, torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()
    try_step(model, prepared.batches[0], prepared.trainer.batch_loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_its_figures_are_those_of_the_step(make):
    prepared = run.prepare(run.load(make(), SILENT), SILENT)
    model, batch, loss = prepared.model, prepared.batches[0], prepared.trainer.batch_loss
    found = try_step(model, batch, loss)
    assert found.loss == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)
    assert found.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.training == 3 * 4 * sum(p.numel() for p in rw.trainable_parameters(model))
    twice = try_step(model, {key: torch.cat([value, value]) for key, value in batch.items()}, loss)
    assert twice.activations == pytest.approx(2 * found.activations, rel=0.05)
    assert found.idle == []


def test_it_recomputes_activations_where_the_run_does(make):
    kept = [
        run.prepare(run.load(make(gradient_checkpointing=checkpointing), SILENT), SILENT).trial.activations
        for checkpointing in (False, True)
    ]
    assert kept[1] < kept[0] / 2


def test_a_base_that_is_not_finite_stops_before_any_step(make, changed_model, tmp_path):
    def spoil(model, tokenizer):
        model.model.norm.weight[3] = float("nan")

    with pytest.raises(TrainingError, match="first batch: expected a finite loss"):
        run.train(make(model=changed_model(spoil)), SILENT)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_adapters_that_the_loss_does_not_depend_on_are_refused(make, changed_model):
    def cut(model, tokenizer):
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()

    with pytest.raises(NoGradient, match="nothing but zeros"):
        run.prepare(run.load(make(model=changed_model(cut), target_modules=["v_proj"]), SILENT), SILENT)


def test_some_layers_without_a_gradient_are_named(make, changed_model, capsys):
    def cut(model, tokenizer):
        model.model.layers[1].self_attn.o_proj.weight.zero_()

    console = Console(width=300)
    run.prepare(run.load(make(model=changed_model(cut), target_modules=["v_proj"]), console), console)
    assert "1 adapted layers got no gradient" in capsys.readouterr().out


def test_answers_that_never_end_are_refused(make, tmp_path, changed_model):
    def without_ends(model, tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "")

    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    with pytest.raises(DataError, match="no answer of the 8 samples trains an end token"):
        run.prepare(run.load(make(model=changed_model(without_ends), data=str(data)), SILENT), SILENT)
    run.prepare(run.load(make(data=str(data)), SILENT), SILENT)


def without_an_end(model, tokenizer):
    tokenizer.eos_token = None


def with_a_new_token(model, tokenizer):
    tokenizer.add_tokens(["say"])


def with_a_template_that_raises(model, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"


@pytest.mark.parametrize(
    ("change", "form", "message"),
    [
        (without_an_end, "pairs", "expected an eos_token"),
        (with_a_new_token, "pairs", "training sample 1: expected tokens with a row .* found 'say'"),
        (with_a_template_that_raises, "chats", r"chats\.jsonl, line 1: the chat template refuses .*no such role"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_any_step(make, changed_model, tmp_path, change, form, message):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    recipe = make(model=changed_model(change), **({"data": str(data)} if form == "chats" else {}))
    with pytest.raises(DataError, match=message):
        run.train(recipe, SILENT)
    assert not list((tmp_path / "run").glob("*"))


def test_samples_longer_than_learned_positions_are_refused_before_any_step(make, tiny, tmp_path):
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(
        vocab_size=300, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    data = tmp_path / "lengths.jsonl"
    data.write_text("".join(json.dumps({"text": "a" * length}) + "\n" for length in (3, 15, 16, 4)))
    recipe = make(model=str(tmp_path / "gpt2"), data=str(data))
    with pytest.raises(
        DataError, match=r"training sample 3: expected at most 16 tokens.*found 17\. Set max_length: 16"
    ):
        run.train(recipe, SILENT)
    run.prepare(run.load(recipe.model_copy(update={"max_length": 16}), SILENT), SILENT)


def test_padding_that_hides_the_end_is_refused(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    end = tokenizer.eos_token_id
    facts = preflight.DataFacts(samples=2, tokens=6, trained=4, longest=3, full=0, ends=2)
    sound = {"labels": torch.tensor([[-100, 7, end], [7, end, -100]])}
    hidden = {"labels": torch.tensor([[-100, 7, -100], [7, -100, -100]])}
    assert preflight.check_ends(facts, [hidden, sound], {end}, tokenizer, answers=True) == []
    with pytest.raises(DataError, match="hides it"):
        preflight.check_ends(facts, [hidden], {end}, tokenizer, answers=True)


def test_running_text_need_not_end(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    facts = preflight.DataFacts(samples=2, tokens=6, trained=6, longest=3, full=2, ends=0)
    (warning,) = preflight.check_ends(facts, [], {1}, tokenizer, answers=False)
    assert "not learn to stop" in warning


def test_too_little_memory_is_said_before_it_is_felt(make, monkeypatch, capsys):
    monkeypatch.setattr("rankwise.train.run.trial_step._memory", lambda device: 10**5)
    console = Console(width=300)
    run.prepare(run.load(make(), console), console)
    assert "gradient_checkpointing" in capsys.readouterr().out
