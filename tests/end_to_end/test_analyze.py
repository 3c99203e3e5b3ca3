"""`rankwise analyze` and a run's own page."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.analyze import analyze
from rankwise.train.run import run

SILENT = Console(quiet=True)


@pytest.fixture
def make(tiny: Path, pairs_file: Path, tmp_path: Path):
    def make(**changes):
        values = {
            "model": str(tiny), "data": str(pairs_file), "eval_split": 8, "rank": 4, "learning_rate": 1e-2,
            "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        return recipes.parse(values | changes)

    return make


@pytest.mark.draws
def test_a_run_ends_with_a_page(make):
    result = run.train(make(init="lora-ga", scaling="rslora", alignment_steps=2, init_batches=2), SILENT)
    text = result.page.read_text()
    for heading in ("Loss", "Relative change", "Singular values", "Amplification", "Samples", "Recipe"):
        assert heading in text
    content = json.loads(result.page.with_suffix(".json").read_text())
    assert len(content["adapters"][0]["sites"]) == 14
    assert content["over_run"].keys() == {"0", "2"}
    start = content["over_run"]["0"]["sgd"]
    assert all(0.5 < site["cosine"] <= 1 for site in start.values())  # LoRA-GA's first step is the full one's
    (similar,) = content["similarities"]
    assert (similar["first"], similar["second"]) == ("the start", "the end")


def test_looking_at_the_alignment_changes_nothing(make, tmp_path):
    plain = run.train(make(dropout=0.1, output_dir=str(tmp_path / "plain")), SILENT)
    watched = run.train(make(dropout=0.1, alignment_steps=1, output_dir=str(tmp_path / "watched")), SILENT)
    one, two = (load_file(r.adapter / "adapter_model.safetensors") for r in (plain, watched))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert [row.get("loss") for row in plain.history] == [row.get("loss") for row in watched.history]


def test_the_alignment_of_an_adapter_is_that_of_the_adapted_model(make, tiny, pairs_file):
    result = run.train(make(), SILENT)
    report = analyze([result.adapter], str(tiny), SILENT, batches=str(pairs_file), batch_count=2)
    found = report.adapters[0].alignment
    assert found.keys() == {"sgd", "adamw"}
    recipe = recipes.parse(
        {
            "model": str(tiny), "data": str(pairs_file), "max_train_samples": 8, "max_length": 128,
            "per_device_train_batch_size": 4, "init_batches": 2,
        }
    )  # fmt: skip
    prepared = run.check(run.load(recipe, SILENT), SILENT)
    prepared.trainer.release()
    rw.load(prepared.model, result.adapter, trainable=True)
    expected = rw.analysis.first_step_alignment(prepared.model, prepared.batches, optimizer="adamw")
    assert {name: site.cosine for name, site in found["adamw"].items()} == pytest.approx(expected, abs=1e-5)


def test_several_adapters_from_the_command_line(make, tmp_path):
    adapters = [
        str(run.train(make(seed=seed, output_dir=str(tmp_path / f"run{seed}")), SILENT).adapter) for seed in (0, 1)
    ]
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["analyze", *adapters, "--out", str(out), "--prompt", "say 3: ", "--intruders"])
    assert done.exit_code == 0, done.output
    content = json.loads(out.with_suffix(".json").read_text())
    assert [part["name"] for part in content["adapters"]] == ["run0/adapter", "run1/adapter"]
    assert len(content["similarities"]) == 1
    assert content["runs"].keys() == {"run0/adapter", "run1/adapter"}
    assert any("eval_loss" in row for row in content["runs"]["run0/adapter"])
    assert len(content["samples"]) == 2
    assert content["adapters"][0]["sites"][0]["against_base"]["intruders"] is not None
    assert len(content["adapters"][0]["files"]["adapter_model.safetensors"]) == 64


def test_without_the_base_no_model_is_loaded(make, tmp_path, monkeypatch):
    adapter = run.train(make(), SILENT).adapter
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(make().model), "/nowhere"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded a model"))
    report = analyze([adapter], None, SILENT, without_base=True)
    assert all(site.against_base is None and site.change > 0 for site in report.adapters[0].sites)


def test_another_programs_report_beside_an_adapter_is_passed_over(make):
    adapter = run.train(make(), SILENT).adapter
    assert analyze([adapter], None, SILENT, without_base=True).runs
    for content in ("[]", "{", '{"runs": {"x": 5}}', '{"adapters": [{"files": {}}], "runs": {"x": []}}'):
        (adapter.parent / "report.json").write_text(content)
        assert not analyze([adapter], None, SILENT, without_base=True).runs, content


def test_a_checkpoint_does_not_show_the_curve_of_the_end(make):
    result = run.train(make(save_steps=1), SILENT)
    assert not analyze([result.adapter.parent / "checkpoint-1"], None, SILENT, without_base=True).runs


@pytest.mark.parametrize("flags", [{"prompts": ["x"]}, {"batches": "d.jsonl"}, {"intruders": True}])
def test_what_needs_a_model_is_refused_without_one(tmp_path, flags):
    with pytest.raises(RecipeError, match="without-base"):
        analyze([tmp_path], None, SILENT, without_base=True, **flags)


def test_no_adapter_is_an_error_that_says_where(tmp_path):
    done = CliRunner().invoke(app, ["analyze", str(tmp_path / "none"), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 2
    assert not (tmp_path / "page.html").exists()
