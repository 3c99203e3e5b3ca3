"""Runs whose pairs start anew or are squeezed on the way: the same function, the same file, the same end."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise as rw
import rankwise.train.trainer.reshaping_callback as reshaping_callback
from rankwise.errors import RecipeError, SpecError
from rankwise.squeezing import squeeze
from rankwise.train import recipe as recipes
from rankwise.train.run import run

SILENT = Console(quiet=True)
RESTARTS = {
    "kaiming": {"restart_every": 2},
    "from the present gradient": {"restart_every": 2, "init": "lora-ga", "init_batches": 2, "dropout": 0.1},
    "what is kept is cut": {"restart_every": 2, "restart_rank": 3, "init": "lora-ga", "init_batches": 2},
    "dora, inputs": {"restart_every": 3, "variant": "dora", "init": "corda", "init_batches": 2},
    "spectral": {"restart_every": 3, "optimizer": "spectral"},
    "end of an epoch, accumulation": {
        "restart_every": 2, "gradient_accumulation_steps": 3, "init": "lora-ga", "init_batches": 2,
        "max_steps": -1, "num_train_epochs": 2.0,
    },
}  # fmt: skip
SHIPPED = {
    "at the end": {"ship_rank": 2, "ship_steps": 0},
    "repaired": {"ship_rank": 2, "ship_steps": 2, "dropout": 0.1},
    "with a start": {"ship_rank": 2, "ship_steps": 3, "init": "lora-ga", "init_batches": 2, "optimizer": "polora"},
    "after restarts": {"ship_rank": 2, "ship_steps": 1, "restart_every": 2},
}


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
            "max_steps": 7,
            "save_steps": 1,
            "eval_steps": 7,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "run"),
        }
        return recipes.parse(values | changes)

    return make


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(40)[None] + 20).logits


@pytest.mark.parametrize("changes", [*RESTARTS.values(), *SHIPPED.values()], ids=[*RESTARTS, *SHIPPED])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(make, tmp_path, changes):
    """Before, at and after an event, the one or the other."""
    whole = run.train(make(**changes, output_dir=str(tmp_path / "whole")), SILENT)
    expected = weights(whole.adapter)
    for step in (2, 5):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = run.train(make(**changes, resume_from_checkpoint=str(checkpoint)), SILENT)
        found = weights(resumed.adapter)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), step
        keys = ("eval_loss_after", "squeeze_error", "eval_loss_wide", "eval_loss_squeezed")
        assert [whole.metrics.get(key) for key in keys] == [resumed.metrics.get(key) for key in keys]


@pytest.mark.parametrize("changes", [RESTARTS["dora, inputs"], SHIPPED["after restarts"]], ids=["restarts", "shipped"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_file_is_the_model_for_peft_too_and_the_base_is_untouched(make, tiny, changes):
    prepared = run.prepare(run.load(make(**changes), SILENT), SILENT)
    result = run.execute(prepared, SILENT)
    adapted = logits(prepared.model)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), result.adapter)
    torch.testing.assert_close(logits(peft), adapted, rtol=1e-5, atol=1e-5)
    rw.detach(prepared.model)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    found, expected = prepared.model.state_dict(), base.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_every_restart_comes_at_its_step_and_leaves_the_function(make, monkeypatch):
    plain, changes = reshaping_callback.restart, []

    def watched(model, *args, **kwargs):
        before = logits(model)
        plain(model, *args, **kwargs)
        changes.append(float((logits(model) - before).norm() / before.norm()))
        model.train()

    monkeypatch.setattr(reshaping_callback, "restart", watched)
    run.train(make(restart_every=2, init="lora-ga", init_batches=2, eval_split=None, eval_steps=None), SILENT)
    assert len(changes) == 3  # after steps 2, 4 and 6 of 7
    assert max(changes) < 1e-6


def test_ranks_add_up_in_the_file(make):
    config = json.loads((run.train(make(restart_every=2), SILENT).adapter / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (4 * 4, {})  # at steps 2, 4 and 6


def test_the_moments_of_the_pairs_are_dropped(make, monkeypatch):
    plain, kept = reshaping_callback.ReshapingCallback._forget_moments, []

    def watched(self):
        plain(self)
        kept.append([len(self._trainer.optimizer.state[p]) for p in rw.trainable_parameters(self._trainer.model)])

    monkeypatch.setattr(reshaping_callback.ReshapingCallback, "_forget_moments", watched)
    run.train(make(restart_every=4, variant="dora"), SILENT)
    (sizes,) = kept
    assert sizes.count(0) == 2 * len(sizes) // 3  # a magnitude goes on as it was


@pytest.mark.parametrize("changes", SHIPPED.values(), ids=SHIPPED)
def test_what_is_shipped_is_narrow_and_its_losses_are_stated(make, tmp_path, changes):
    result = run.train(make(**changes, save_steps=100), SILENT)
    assert all(min(tensor.shape) == 2 for tensor in weights(result.adapter).values())
    metrics = result.metrics
    wide = rw.read(tmp_path / "run" / "wide")
    assert squeeze(wide, rank=2).error == pytest.approx(metrics["squeeze_error"], abs=1e-6)
    assert metrics["eval_loss_wide"] < metrics["eval_loss_squeezed"]
    if changes["ship_steps"] == 0:
        assert metrics["eval_loss_after"] == pytest.approx(metrics["eval_loss_squeezed"], abs=1e-6)
    else:
        assert metrics["eval_loss_after"] < metrics["eval_loss_squeezed"]
    losses = [f"{metrics[f'eval_loss_{when}']:.4f}" for when in ("wide", "squeezed", "after")]
    assert f"of the change lost; held-out loss {' → '.join(losses)}" in result.page.read_text()
    assert " → ".join(losses) in (result.adapter / "README.md").read_text()


def test_a_run_without_held_out_data_ships_too(make):
    metrics = run.train(make(ship_rank=1, ship_steps=2, eval_split=None, eval_steps=None), SILENT).metrics
    assert 0 < metrics["squeeze_error"] < 1
    assert "eval_loss_wide" not in metrics


def test_losses_and_evaluations_are_logged_as_without_it(make):
    """An evaluation inside a step must not swallow that step's own."""
    rows = run.train(make(ship_rank=2, ship_steps=4, eval_steps=3), SILENT).history
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6, 7]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"restart_every": 2, "variant": "adalora"}, SpecError, "restart: expected the variant lora or dora"),
        ({"restart_every": 2, "anchor": "fold"}, SpecError, "found lora with anchor='fold'"),
        ({"restart_every": 2, "init": "loftq"}, SpecError, "init Loftq changes the model's function"),
        ({"restart_rank": 2}, RecipeError, "`restart_rank`: .*expected restart_every beside it"),
        ({"ship_rank": 2, "variant": "dora"}, SpecError, "squeeze: expected the variant lora"),
        ({"ship_rank": 4}, SpecError, "expected a rank below the 4 that is trained, found 4"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_model_is_loaded(make, changes, error, said):
    with pytest.raises(error, match=said):
        run.load(make(**changes, model="/nowhere"), SILENT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ship_rank": 2, "ship_steps": 7}, "`ship_steps`: expected fewer than the run's 7 steps, whose last they are"),
        ({"restart_every": 7}, "`restart_every`: expected fewer than the 7 steps"),
        ({"restart_every": 5, "ship_rank": 2, "ship_steps": 2}, "`restart_every`: expected fewer than the 5 steps"),
        ({"restart_every": 8, "max_steps": -1, "num_train_epochs": 1.0}, "expected fewer than the 8 steps"),
    ],
)
def test_what_would_never_happen_in_so_few_steps_is_refused_before_the_start(make, changes, said):
    loaded = run.load(make(**changes), SILENT)
    with pytest.raises(RecipeError, match=re.escape(said)):
        run.check(loaded, SILENT)
