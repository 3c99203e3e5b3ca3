"""What a run's page says first, and what it says of an earlier run."""

import json

import pytest
from rich.console import Console

from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.run.beside import earlier_run
from rankwise.train.run.loading import load
from rankwise.train.run.verdict import verdict

RECIPE = recipes.parse({"model": "a/tiny", "data": "pairs.jsonl", "rank": 4, "init": {"name": "lora-ga", "gamma": 8}})
METRICS = {
    "steps": 1200,
    "learning_rate": 2e-4,
    "train_samples": 4096,
    "train_seconds": 3700.0,
    "trainable_parameters": 1221120,
    "eval_loss_before": 1.8589,
    "eval_loss_after": 1.3223,
}


def logged(*losses):
    return [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(losses)]


def said(history=(), figures=None, **changes):
    return verdict(RECIPE, METRICS | changes, figures or {}, history or logged(1.8589, 1.3223), 7)


def test_what_was_trained_whether_it_helped_and_at_what_cost():
    speed = [{"step": 1, "tokens_per_second": 900.0, "peak_memory_gib": 2.05}]
    assert said([*logged(1.8589, 1.3223), *speed]) == [
        "A rank-4 adapter (variant lora, init lora-ga) on 7 layers of tiny: 1,200 steps of adamw at 0.0002 on 4,096 "
        "samples of pairs.",
        "It helped: the held-out loss fell by 0.537, from 1.859 to 1.322.",
        "It took 62 min, 900 tokens a second, 2.0 GiB at most; 1,221,120 numbers were trained.",
    ]


def test_harm_is_said():
    assert "It did not help: the held-out loss rose by 0.100, from 1.000 to 1.100." in said(
        logged(1.0, 1.1), eval_loss_before=1.0, eval_loss_after=1.1
    )


def test_a_lower_loss_on_the_way_is_said_and_noise_is_not():
    losses = logged(1.8589, 1.2, 1.3223)
    assert any(line.startswith("It was lower after step 10 (1.200)") for line in said(losses))
    assert not any("It was lower" in line for line in said(logged(1.8589, 1.321, 1.3223)))


def test_nothing_is_claimed_without_held_out_samples():
    assert said([], eval_loss_before=None, eval_loss_after=None)[1].startswith("Whether it helped is not known")


def test_accuracy():
    assert "; accuracy: from 50.0% to 81.3%." in said(figures={"accuracy": ("50.0%", "81.3%")})[1]
    assert "; reward margin: 0.3." in said(figures={"reward margin": ("", "0.3")})[1]


def test_an_earlier_run(tmp_path):
    rows = logged(1.8, 1.2)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    earlier = earlier_run(str(tmp_path))
    assert earlier.history == rows
    (sentence,) = earlier.compared(METRICS)
    assert f"is 0.122 higher than that of {tmp_path.name} (1.200)" in sentence
    assert earlier.compared(METRICS | {"eval_loss_after": None}) == []


@pytest.mark.parametrize("text", [None, "[1]\n", '{"loss": 1}\n'])
def test_an_earlier_run_that_is_none_is_named_before_the_model_is_loaded(tmp_path, text):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(RecipeError, match="`beside`"):
        load(recipes.parse({"model": "no/such-model", "data": "kjv", "beside": str(tmp_path)}), Console(quiet=True))
