"""`task: grpo` on a tiny Llama: rewards of several kinds, the base as reference, exact resumes."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import rankwise as rw
from rankwise.errors import DataError, RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.data.rewards import exact, number, reasoning_gym
from rankwise.train.run import run

SILENT = Console(quiet=True)
ROWS = [{"prompt": f"say {i}: ", "answer": str(i), "source": "a"} for i in range(16)]
FUNCTION = "def reward(prompts, completions, answer, **fields):\n    return [t.count('e') / 4 for t in completions]\n"


@pytest.fixture
def make(tiny: Path, tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "reward.py").write_text(FUNCTION)

    def make(**changes):
        values = {
            "model": str(tiny),
            "task": "grpo",
            "data": str(tmp_path / "data.jsonl"),
            "reward": str(tmp_path / "reward.py"),
            "num_generations": 4,
            "max_completion_length": 4,
            "rank": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "init_batches": 1,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "run"),
        }
        return recipes.parse(values | changes)

    return make


def test_a_run_learns_from_its_rewards_and_resumes_bit_for_bit(make, tmp_path):
    options = {"init": "lora-ga", "beta": 0.1, "eval_split": 4, "per_device_eval_batch_size": 4, "eval_steps": 3}
    whole = run.train(make(**options, output_dir=str(tmp_path / "whole")), SILENT)
    assert whole.metrics["rewards_of"] == "held-out"
    assert "held-out reward" in whole.page.read_text()
    # Before the first step the policy is the base.
    kl = [row["kl"] for row in whole.history if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-6) and max(kl) > 0
    again = make(**options, output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    expected, found = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, run.train(again, SILENT)))
    assert all(torch.equal(expected[key], found[key]) for key in expected | found)


def test_the_reference_is_the_base_after_training_too(make, tiny):
    prepared = run.prepare(run.load(make(init="pissa", beta=0.1), SILENT), SILENT)
    model, trainer = prepared.model.eval(), prepared.trainer
    with torch.no_grad():
        for tensor in rw.trainable_parameters(model):
            tensor += 0.05 * torch.randn_like(tensor)
        ids = torch.arange(4, 14)[None]
        with rw.disabled(model):
            expected = model(ids).logits
        assert torch.equal(trainer.ref_model(input_ids=ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)


def test_built_in_rewards():
    asked = ["q"] * 3
    said = ["<answer> 7 </answer>.", "so it is 7", "7"]
    assert exact(asked, said, ["7"] * 3) == [1.0, 0.0, 1.0]
    assert number(asked, said, ["7"] * 3) == [1.0, 1.0, 1.0]


def test_reasoning_gyms_questions_are_scored_by_it(make):
    pytest.importorskip("reasoning_gym")
    recipe = make(data="reasoning-gym/chain_sum", reward="reasoning-gym", max_train_samples=8, init="kaiming")
    prepared = run.check(run.load(recipe, SILENT), SILENT)
    row = prepared.trainer.train_dataset[0]
    fields = json.loads(row["fields"])
    scores = reasoning_gym([row["prompt"]], [fields["answer"]], [fields["answer"]], [fields["metadata"]])
    assert scores == [1.0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward": None}, RecipeError, "`reward`: task grpo needs one"),
        ({"reward": "nothing.py"}, RecipeError, "`reward`: expected one of exact, number, reasoning-gym, or a Python"),
        ({"data": "kjv"}, DataError, "the reward fails on it"),
        ({"data": "movie-reviews"}, DataError, "task is grpo: expected data of the prompt form"),
        ({"data": "reasoning-gym/no_such_task", "reward": "exact"}, DataError, "reasoning-gym"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(make, changes, error, message):
    with pytest.raises(error, match=message):
        run.check(run.load(make(**changes), SILENT), SILENT)


def test_a_reward_that_is_wrong_is_named(make, tmp_path):
    for text, message in (
        ("1/0", "cannot be run: ZeroDivisionError"),
        ("x = 1", r"expected a function reward\(prompts, completions, \*\*fields\), found none"),
    ):
        (tmp_path / "reward.py").write_text(text)
        with pytest.raises(RecipeError, match=message):
            run.load(make(), SILENT)
    (tmp_path / "reward.py").write_text("def reward(prompts, completions, **fields):\n    return ['good']\n")
    with pytest.raises(DataError, match="line 1: expected of the reward a list with a number for each completion"):
        run.check(run.load(make(), SILENT), SILENT)


def test_fields_that_do_not_go_with_it_are_refused_by_name(make):
    for changes, message in (
        ({"num_generations": 3}, "`per_device_train_batch_size`: expected a multiple of the 3 answers"),
        ({"learning_rate": "auto"}, "`learning_rate`: does not go with task grpo"),
        ({"dropout": 0.1}, "`dropout`: does not go with task grpo"),
        ({"loss": "dpo"}, "`loss`: expected one of grpo, dr_grpo"),
        ({"task": "causal-lm"}, "`reward`: goes with task grpo; with causal-lm expected none"),
    ):
        with pytest.raises(RecipeError, match=message):
            make(**changes)
