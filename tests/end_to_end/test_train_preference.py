"""`task: preference` on a tiny Llama: the reference is the base for every start, the losses are the papers'."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import rankwise as rw
from rankwise.errors import DataError, NoTrainableTokens, RecipeError
from rankwise.inits import INITS
from rankwise.train import recipe as recipes
from rankwise.train.data.dataset import load_data
from rankwise.train.data.preferences import tokenised_pairs
from rankwise.train.run import run
from rankwise.trials.preparing import with_full_weights

SILENT = Console(quiet=True)
PAIRS = [{"prompt": f"say {i}: ", "chosen": f"{i} is it", "rejected": f"no {i}"} for i in range(24)]
ANSWERS = [
    {"prompt": f"say {i}: ", "completion": f"{i} is it" if i % 3 else f"no {i}", "label": i % 3 > 0} for i in range(24)
]
# LoftQ's start is meant to differ from the base that it is given.
STARTS = [name for name, row in INITS.items() if row.cls.keeps_function]


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(tiny: Path, tmp_path: Path):
    def make(rows=PAIRS, **changes):
        values = {
            "model": str(tiny),
            "task": "preference",
            "data": str(written(tmp_path / "data.jsonl", rows)),
            "rank": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "init_batches": 2,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "run"),
        }
        return recipes.parse(values | changes)

    return make


def moved(model: torch.nn.Module) -> None:
    """As if it had been trained."""
    with torch.no_grad():
        for tensor in rw.trainable_parameters(model):
            tensor += 0.05 * torch.randn_like(tensor)


def log_probability(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log π(y|x) = Σ log π(y_t | x, y_<t)."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        steps = model(ids).logits[0].log_softmax(-1)
    return sum(steps[place - 1, ids[0, place]] for place in range(len(prompt), ids.shape[1]))


@pytest.mark.parametrize("init", STARTS)
def test_before_the_first_step_no_answer_is_preferred_whatever_the_start(make, init):
    prepared = run.prepare(run.load(make(init=init, beta=0.7), SILENT), SILENT)
    for batch in prepared.batches:
        assert float(prepared.trainer.batch_loss(prepared.model, batch).detach()) == pytest.approx(
            math.log(2), abs=1e-6
        )


@pytest.mark.parametrize("changes", [{}, {"variant": "dora"}, {"dropout": 0.3}, {"precompute_ref_log_probs": True}])
def test_the_loss_of_dpo_is_the_papers_with_the_base_as_reference(make, tiny, changes):
    """−log σ(β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x)), eq. 7 of arXiv 2305.18290."""
    beta = 0.3
    prepared = run.prepare(run.load(make(init="lora-ga", beta=beta, **changes), SILENT), SILENT)
    model, trainer, base = prepared.model.eval(), prepared.trainer, AutoModelForCausalLM.from_pretrained(tiny)
    moved(model)
    rows = list(trainer.train_dataset.select(range(4)))

    def log_ratio(row, answer):
        return log_probability(model, row["prompt_ids"], row[answer]) - log_probability(
            base, row["prompt_ids"], row[answer]
        )

    margins = torch.stack([log_ratio(row, "chosen_ids") - log_ratio(row, "rejected_ids") for row in rows])
    loss = trainer.batch_loss(model, trainer.data_collator(rows))
    torch.testing.assert_close(loss.detach(), -torch.sigmoid(beta * margins).log().mean(), atol=1e-5, rtol=1e-5)


def test_the_loss_of_kto_is_the_papers_with_the_base_as_reference(make, tiny):
    """λ_y − v(x, y) with z₀ = max(0, mean of log π/π_ref over mismatched pairs), eqs. 5 to 7 of arXiv 2402.01306."""
    beta, weights = 0.3, {True: 1.0, False: 1.5}
    recipe = make(ANSWERS, loss="kto", beta=beta, undesirable_weight=1.5, init="pissa")
    prepared = run.prepare(run.load(recipe, SILENT), SILENT)
    model, trainer, base = prepared.model.eval(), prepared.trainer, AutoModelForCausalLM.from_pretrained(tiny)
    moved(model)
    rows = list(trainer.train_dataset.select(range(4)))
    assert {row["label"] for row in rows} == {True, False}

    def log_ratio(row, answer):
        return log_probability(model, row["prompt_ids"], answer) - log_probability(base, row["prompt_ids"], answer)

    others = [rows[place - 1]["completion_ids"] for place in range(4)]
    z0 = torch.stack([log_ratio(row, other) for row, other in zip(rows, others, strict=True)]).mean().clamp(min=0)
    losses = []
    for row in rows:
        reward = log_ratio(row, row["completion_ids"])
        gain = beta * (reward - z0) if row["label"] else beta * (z0 - reward)
        losses.append(weights[row["label"]] * (1 - torch.sigmoid(gain)))
    loss = trainer.batch_loss(model, trainer.data_collator(rows))
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_a_start_is_computed_from_the_gradient_of_the_preference(make):
    """At the start it is −β/2 (∇ log π(y_w|x) − ∇ log π(y_l|x))."""
    prepared = run.check(run.load(make(beta=0.4), SILENT), SILENT)
    model, trainer = prepared.model, prepared.trainer
    rows = list(trainer.train_dataset.select(range(3)))
    batch = trainer.data_collator(rows)
    name = "model.layers.1.mlp.down_proj"
    found = rw.gradients(model, [batch], [name], loss=trainer.batch_loss)[name].matrix

    def ratio(model, batch):
        def of(row, answer):
            ids = torch.tensor([row["prompt_ids"] + row[answer]])
            steps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            return steps[len(row["prompt_ids"]) - 1 :].sum()

        return -0.2 * torch.stack([of(row, "chosen_ids") - of(row, "rejected_ids") for row in rows]).mean()

    torch.testing.assert_close(found, rw.gradients(model, [batch], [name], loss=ratio)[name].matrix)


@pytest.mark.draws
@pytest.mark.parametrize(
    ("rows", "changes", "figure"),
    [
        (PAIRS, {}, "reward accuracy"),
        (PAIRS, {"loss": ["sigmoid_norm", "sft"], "loss_weights": [1.0, 0.2]}, "reward accuracy"),
        (ANSWERS, {"loss": "kto"}, "reward margin"),
        (PAIRS, {"loss": "kto"}, "reward margin"),
        (PAIRS, {"loss": "reward"}, "reward accuracy"),
    ],
    ids=["dpo", "two losses", "kto", "kto of pairs", "reward"],
)
def test_a_run_learns_and_shows_its_rewards(make, rows, changes, figure):
    recipe = make(rows, init="lora-ga", eval_split=6, max_steps=8, eval_steps=4, **changes)
    result = run.train(recipe, SILENT)
    assert result.metrics["reward_margin"] > 0
    assert result.metrics["eval_loss_after"] < result.metrics["eval_loss_before"]
    for file in (result.page, result.adapter / "README.md"):
        assert f"held-out {figure}" in file.read_text()
    assert json.loads((result.adapter.parent / "metrics.json").read_text())["rewards_of"] == "held-out"


@pytest.mark.parametrize(
    ("rows", "changes"),
    [(PAIRS, {"dropout": 0.1}), (ANSWERS, {"loss": "kto"}), (PAIRS, {"loss": "reward"})],
    ids=["dpo", "kto", "reward"],
)
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(make, tmp_path, rows, changes):
    options = {"init": "lora-ga", "eval_split": 4, "eval_steps": 3, **changes}
    whole = run.train(make(rows, **options, output_dir=str(tmp_path / "whole")), SILENT)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    again = make(rows, **options, output_dir=str(tmp_path / "b"), resume_from_checkpoint=checkpoint)
    expected, found = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, run.train(again, SILENT)))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


FORMS = {
    "prompt": [{"prompt": "say it: ", "chosen": "yes", "rejected": "no"}],
    "no prompt": [{"chosen": "say it: yes", "rejected": "say it: no"}],
    "chat": [{"prompt": chat("hi"), "chosen": chat("", "yes")[1:], "rejected": chat("", "no")[1:]}],
    "chat without prompt": [{"chosen": chat("hi", "yes"), "rejected": chat("hi", "no")}],
}


@pytest.mark.parametrize("form", FORMS)
def test_pairs_are_tokenised_as_trl_does(make, tiny, form):
    recipe, rows = make(FORMS[form]), FORMS[form]
    tokenizer = run.load(recipe, SILENT).tokenizer
    data = load_data(recipe)
    assert data.format == "preference"
    found = tokenised_pairs(data.train, tokenizer)[0]
    theirs = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, DPOConfig(bf16=False), "train"
    )[0]
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert found[name] == theirs[name]


def test_ktos_batches_are_trls(make):
    """Each prompt beside the completion before it in its batch."""
    prepared = run.check(run.load(make(ANSWERS, loss="kto"), SILENT), SILENT)
    ours = prepared.trainer.train_dataset
    rows = [ANSWERS[number - 1] for number in ours["rankwise_row"]]
    this = SimpleNamespace(_tokenizer=prepared.tokenizer, calculate_KL=True, undesirable_weight=1, desirable_weight=1)
    arguments = KTOConfig(bf16=False, per_device_train_batch_size=4)
    theirs = KTOTrainer._prepare_dataset(this, Dataset.from_list(rows), prepared.tokenizer, arguments, "train")
    for name in ("prompt_ids", "completion_ids", "KL_completion_ids", "label"):
        assert ours[name] == theirs[name]


def test_ultrafeedbacks_rows_are_preferences(make):
    rows = [
        {"prompt": "hi", "messages": chat("hi", "yes"), "chosen": chat("hi", "yes"), "rejected": chat("hi", "no")}
    ] * 2
    assert load_data(make(rows)).format == "preference"
    with pytest.raises(
        DataError, match=r"data.jsonl, line 1: prompt: expected a message that chosen and rejected begin"
    ):
        load_data(make([rows[0] | {"prompt": "bye"}]))


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}] * 4,
            {},
            "expected data of the form preference .* prompt-completion form",
        ),
        (ANSWERS, {}, "found the unpaired-preference form; set loss: kto"),
        (PAIRS, {"task": "causal-lm"}, r"preference form \(fields chosen, rejected\).* Set task: preference"),
        ([{"prompt": "a", "chosen": "b", "rejected": 3}], {}, "line 1: rejected: expected a text, or a list of mess"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": chat("c")}],
            {},
            "line 1: rejected: expected a str, as the chosen",
        ),
        ([{"chosen": chat("a", "b"), "rejected": chat("c", "d")}], {}, "line 1: expected chosen and rejected to begin"),
        ([PAIRS[0] | {"images": ["x"]}], {}, "line 1: images: found .* has no place in the preference form"),
        ([ANSWERS[0] | {"label": "good"}], {"loss": "kto"}, "line 1: label: expected true, of a desirable completion"),
        ([ANSWERS[1]] * 8, {"loss": "kto"}, "label: expected desirable completions .* found 8 and 0"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_name(make, rows, changes, message):
    with pytest.raises(DataError, match=message):
        run.check(run.load(make(rows, **changes), SILENT), SILENT)


def test_pairs_that_say_nothing_are_left_out_by_name(make, capsys):
    rows = [
        *PAIRS[:6],
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "p" * 40, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 40 + "x", "rejected": "b" * 40 + "y"},
        {"prompt": "a", "chosen": "b", "rejected": ""},
    ]
    prepared = run.check(run.load(make(rows, max_length=30), SILENT), console := Console(width=300))
    assert prepared.trainer.train_dataset["rankwise_row"] == [1, 2, 3, 4, 5, 6, 10]
    shown = capsys.readouterr().out
    for line in (
        "1 of 10 training samples have a rejected answer equal to the chosen one; the first is",
        "1 of 10 training samples have a prompt that fills max_length (30)",
        "1 of 10 training samples differ only beyond max_length (30)",
        "1 of 10 training samples have an empty answer; the first is",
    ):
        assert line in shown, console
    with pytest.raises(NoTrainableTokens, match="4 of 4 training samples have a rejected answer equal"):
        run.check(run.load(make([rows[6]] * 4), SILENT), SILENT)


def test_an_adapter_on_the_head_and_full_fine_tuning_are_refused(make):
    with pytest.raises(RecipeError, match="task`: preference compares the model with its base"):
        with_full_weights(make(dtype="float32"))


def test_fields_of_other_tasks_and_losses_are_refused_by_name(make):
    for changes, message in (
        ({"task": "causal-lm", "beta": 0.1}, "`beta`: goes with task preference or grpo; with causal-lm expected none"),
        ({"loss": "dop"}, "`loss`: expected one of dpo, .* did you mean 'dpo'"),
        ({"loss": ["dpo", "kto"]}, "`loss`: expected one loss, or several that compare pairs"),
        ({"loss": "kto", "label_smoothing": 0.1}, "`label_smoothing`: is no option of the loss kto"),
        ({"loss": "kto", "per_device_train_batch_size": 1}, "`per_device_train_batch_size`: expected 2 at least"),
        ({"loss": "exo_pair"}, "`label_smoothing`: expected more than 0 with the loss exo_pair"),
        ({"loss": ["dpo", "sft"], "loss_weights": [1.0]}, "`loss_weights`: expected one for each of the 2 losses"),
    ):
        with pytest.raises(RecipeError, match=message):
            make(**changes)
