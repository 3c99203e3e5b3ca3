"""The engines' rules: each has an adapter that it is about. doctor, export, and their commands."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import AttachError, BrokenFile, CheckpointError, SpecError, UnsupportedAdapter
from rankwise.inspection.engines import ENGINES
from rankwise.inspection.engines.rules import BaseFacts, Case, Rule, any_adapter
from rankwise.inspection.inspection import inspect

run = CliRunner()
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
LLAMA = BaseFacts("llama", 2, tied=False)
TIED = BaseFacts("llama", 2, tied=True)
RULES = [(engine, rule) for engine in ENGINES.values() for rule in engine.rules]


class Block(nn.Module):
    """A llama's names, each layer by itself."""

    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        layers = {name: nn.Linear(24, 24) for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")}
        for name, layer in {**layers, "embed_tokens": nn.Embedding(7, 24), **more}.items():
            self.add_module(name, layer)


def saved(folder: Path, more: dict[str, nn.Module] | None = None, **fields: Any) -> None:
    block = Block(**(more or {}))
    rw.attach(block, rw.LoRA(**{"rank": 2, "alpha": 4, "target_modules": ["v_proj", "q_proj", "k_proj"], **fields}))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(block):
            parameter.add_(torch.randn(parameter.shape))
    rw.save(block, folder)


def patched(folder: Path, **entries: Any) -> None:
    saved(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def adalora(folder: Path) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=["q_proj"])
    peft.get_peft_model(Block(), config).save_pretrained(folder)


def bottleneck(folder: Path) -> None:
    block = Block()
    rw.attach(block, rw.Bottleneck(target_modules=["q_proj"], width=3))
    rw.save(block, folder)


# What a rule is about → a directory that has it, and the base where the rule asks for one.
TRIGGERS: dict[str, tuple[Callable[[Path], None], BaseFacts | None]] = {
    "layers' own state": (bottleneck, None),
    "a convolution with dilation or padding of its own": (
        lambda folder: saved(folder, {"conv": nn.Conv2d(2, 4, 3, dilation=2)}, target_modules=["conv"]),
        None,
    ),
    "DoRA": (lambda folder: saved(folder, variant="dora"), None),
    "modules_to_save": (lambda folder: saved(folder, modules_to_save=["lm_head"]), None),
    "trained biases": (lambda folder: saved(folder, bias="lora_only"), None),
    "trained rows of tokens": (
        lambda folder: saved(folder, trainable_token_indices={"embed_tokens": [1, 3]}),
        None,
    ),
    "a convolution": (lambda folder: saved(folder, {"conv": nn.Conv2d(2, 4, 3)}, target_modules=["conv"]), None),
    "an embedding other than embed_tokens or lm_head": (
        lambda folder: saved(folder, {"wpe": nn.Embedding(5, 24)}, target_modules=["wpe"]),
        None,
    ),
    "a rank above 512": (
        lambda folder: saved(folder, {"big": nn.Linear(520, 520)}, target_modules=["big"], rank=513),
        None,
    ),
    "pairs relative to a changed base": (lambda folder: patched(folder, init_lora_weights="pissa"), None),
    "AdaLoRA": (adalora, None),
    "ranks or alphas of single layers": (lambda folder: saved(folder, rank_pattern={"q_proj": 3}), None),
    "ranks of single layers": (lambda folder: saved(folder, rank_pattern={"q_proj": 3}), None),
    "some of a stack's layers alone": (lambda folder: saved(folder, target_modules=["q_proj"]), None),
    "a regular expression as target_modules": (
        lambda folder: patched(folder, target_modules="(q|k|v)_proj"),
        None,
    ),
    "rsLoRA": (lambda folder: saved(folder, scaling="rslora"), None),
    "alphas of single layers": (lambda folder: saved(folder, alpha_pattern={"q_proj": 3}), None),
    "an embedding tied to the output head": (lambda folder: saved(folder, target_modules=["embed_tokens"]), TIED),
    "a head tied to the embedding": (lambda folder: saved(folder, target_modules=["lm_head"]), TIED),
    "a layer without a name in GGUF": (saved, LLAMA),  # whose names begin with model.layers
    "a layer without a name in mlx-lm": (saved, BaseFacts("t5", 2, tied=False)),
    "a PEFT directory": (saved, None),
    "another base than llama, mistral or gemma2": (
        lambda folder: patched(folder, base_model_name_or_path="Qwen/Qwen3-1.7B"),
        None,
    ),
    "a layer beside those of attention and MLP": (lambda folder: saved(folder, target_modules=["lm_head"]), LLAMA),
    "an alpha that is no whole number": (lambda folder: saved(folder, alpha=7.5), None),
    "queries and keys": (saved, None),
    "an embedding with DoRA": (
        lambda folder: saved(folder, variant="dora", target_modules=["embed_tokens"]),
        None,
    ),
}


def labels(pairs: list[Any]) -> list[str]:
    return [f"{engine.label}-{rule.about}" for engine, rule in pairs]


@pytest.mark.parametrize(("engine", "rule"), RULES, ids=labels(RULES))
def test_every_rule_has_its_adapter(engine: Any, rule: Rule, tmp_path: Path) -> None:
    make, base = TRIGGERS[rule.about]
    make(tmp_path)
    case = Case(inspect(tmp_path), base)
    finding = rule.finding(case)
    assert finding is not None
    assert (finding.effect, finding.remedy, finding.source) == (rule.effect, rule.remedy, rule.source)
    names = {site.name for site in case.facts.sites} | set(case.facts.replaced) | {"the adapter"}
    assert set(finding.sites) <= names
    assert finding in engine.findings(case)


@pytest.mark.parametrize(("engine", "rule"), RULES, ids=labels(RULES))
def test_no_rule_is_about_a_plain_adapter_of_values(engine: Any, rule: Rule, tmp_path: Path) -> None:
    """On v_proj alone of an untied Llama: every engine but SGLang's stacks reads it."""
    patched(tmp_path, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    facts = inspect(tmp_path)
    applies = rule.finding(Case(facts)) is not None
    assert applies == (rule.condition is any_adapter or rule.about == "queries and keys")


def test_verdicts_go_by_the_gravest_and_worst(tmp_path: Path) -> None:
    saved(tmp_path, modules_to_save=["lm_head"], scaling="rslora")
    verdicts = {verdict.engine: verdict for verdict in rw.doctor(tmp_path)}
    assert {name: verdict.answer for name, verdict in verdicts.items()} == {
        "PEFT": "yes", "vLLM": "no", "SGLang": "no", "llama.cpp": "no", "Ollama": "no", "MLX": "no"
    }  # fmt: skip
    sglang = verdicts["SGLang"]
    assert [finding.effect for finding in sglang.findings] == ["drops", "mis-scales"]
    assert set(sglang.findings[1].sites) == {"q_proj", "k_proj", "v_proj"}
    assert "lora.py: LoRAAdapter.__init__" in sglang.findings[1].source
    assert sglang.reason.endswith("export writes a merged checkpoint")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_dora_needs_its_base_or_a_rank(engine: str, tmp_path: Path) -> None:
    """The nearest LoRA has the error that is stated: ‖ΔW − ΔW'‖ over all sites, of the dense change."""
    block = Block()
    rw.attach(block, rw.LoRA(rank=2, variant="dora", target_modules=["q_proj", "k_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(block):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    rw.save(block, tmp_path / "adapter")
    base = rw.detach(block)
    with pytest.raises(UnsupportedAdapter, match=r"refuses DoRA \(._proj and 2 more\).*--base"):
        rw.export(tmp_path / "adapter", engine, tmp_path / "out")
    exported = rw.export(tmp_path / "adapter", engine, tmp_path / "out", base=base, rank=4)
    read = rw.read(tmp_path / "out")
    before = {path: base.get_submodule(path).weight.detach().clone() for path in read.sites}
    rw.load(base, tmp_path / "adapter")
    rw.merge(base)
    lost = size = 0.0
    for path, site in read.sites.items():
        change = base.get_submodule(path).weight.detach() - before[path]
        lost += float((change - site.delta.dense()).square().sum())
        size += float(change.square().sum())
    assert exported.error == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert 0.0 < exported.error < 1.0
    assert (exported.form, read.spec.rank) == ("adapter", 8)


def test_sglang_gets_zero_pairs_for_the_rest_of_a_stack(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    base = Block()
    with pytest.raises(UnsupportedAdapter, match=r"some of a stack's layers alone"):
        rw.export(tmp_path / "adapter", "sglang", tmp_path / "out")
    rw.export(tmp_path / "adapter", "sglang", tmp_path / "out", base=base)
    before, after = rw.read(tmp_path / "adapter").sites, rw.read(tmp_path / "out").sites
    assert set(after) == {"q_proj", "v_proj", "up_proj", "gate_proj"}
    for path, site in after.items():
        expected = before[path].delta.dense() if path in before else torch.zeros(24, 24)
        assert torch.allclose(site.delta.dense(), expected, atol=1e-6)
    (verdict,) = rw.doctor(tmp_path / "out", "sglang")
    assert verdict.answer == "yes"


def test_relative_pairs_are_written_as_changes_of_the_pretrained_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Block()
    config = peft.LoraConfig(
        r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["v_proj", "q_proj", "k_proj"]
    )
    wrapped = peft.get_peft_model(Block(), config)
    wrapped.base_model.model.load_state_dict(base.state_dict(), strict=False)
    x = torch.randn(3, 24)
    model = peft.get_peft_model(_copy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        expected = model.base_model.model.q_proj(x)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedAdapter, match="relative to a changed base"):
        rw.export(tmp_path / "adapter", "vllm", tmp_path / "out")
    before = base.q_proj.weight.detach().clone()
    rw.export(tmp_path / "adapter", "vllm", tmp_path / "out", base=base)
    assert torch.equal(base.q_proj.weight, before)
    delta = rw.read(tmp_path / "out").sites["q_proj"].delta
    with torch.no_grad():
        assert torch.allclose(base.q_proj(x) + delta.apply(x), expected, atol=1e-4)


def _copy(block: Block) -> Block:
    other = Block()
    other.load_state_dict(block.state_dict())
    return other


# ------------------------------------------------------------------------------------------- what cannot be exported


def test_bad_orders(tmp_path: Path) -> None:
    saved(tmp_path / "adapter")
    with pytest.raises(SpecError, match=r"found 'vLLM'; did you mean 'vllm'"):
        rw.export(tmp_path / "adapter", "vLLM", tmp_path / "out")
    with pytest.raises(SpecError, match="rank or error"):
        rw.export(tmp_path / "adapter", "vllm", tmp_path / "out", rank=2, error=0.1)
    with pytest.raises(UnsupportedAdapter, match="names that depend on the base"):
        rw.export(tmp_path / "adapter", "mlx", tmp_path / "out")
    with pytest.raises(BrokenFile, match="nowhere"):
        rw.export(tmp_path / "nowhere", "vllm", tmp_path / "out")
    with pytest.raises(CheckpointError, match="found files in it"):
        rw.export(tmp_path / "adapter", "vllm", tmp_path / "adapter")
    bottleneck(tmp_path / "bottleneck")
    with pytest.raises(UnsupportedAdapter, match="rankwise alone reads it"):
        rw.export(tmp_path / "bottleneck", "vllm", tmp_path / "out")
    base = Block()
    rw.attach(base, rw.LoRA(rank=2, target_modules=["q_proj"]))
    with pytest.raises(AttachError, match="carries adapters"):
        rw.export(tmp_path / "adapter", "vllm", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_strangers_name_of_a_base_is_no_command(tmp_path: Path) -> None:
    patched(tmp_path / "adapter", base_model_name_or_path="x; touch ran\nPARAMETER y")
    exported = rw.export(tmp_path / "adapter", "vllm", tmp_path / "a directory")
    assert shlex.split(exported.start)[2] == "x; touch ran\nPARAMETER y"
    assert str(tmp_path / "a directory") in shlex.split(exported.start)[-1]


# ------------------------------------------------------------------------------------------------ the command line


def test_the_doctors_exit_code_and_json(tmp_path: Path) -> None:
    saved(tmp_path, scaling="rslora")
    command = ["doctor", str(tmp_path)]
    assert run.invoke(app, [*command, "--for", "peft", "--for", "vllm"], env=WIDE).exit_code == 0
    result = run.invoke(app, [*command, "--for", "sglang", "--json"], env=WIDE)
    assert result.exit_code == 1
    (verdict,) = json.loads(result.output)
    assert [finding["about"] for finding in verdict["findings"]] == ["rsLoRA"]
    result = run.invoke(app, command, env=WIDE)
    assert result.exit_code == 1
    for text in ("vLLM reads it right", "SGLang", "mis-scales", "_proj and 2 more", "folds scales into B"):
        assert text in result.output
    assert run.invoke(app, [*command, "--for", "tgi"], env=WIDE).exit_code == 2


def test_the_command_of_export(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", scaling="rslora", rank=20, alpha_pattern={"q_proj": 3})
    result = run.invoke(app, ["export", str(tmp_path / "adapter"), "--for", "vllm"], env=WIDE)
    assert result.exit_code == 0, result.output
    assert "--max-lora-rank 32" in result.output
    out = tmp_path / "adapter-vllm"
    assert "written by rankwise export" in (out / "README.txt").read_text()
    assert all(verdict.answer == "yes" for verdict in rw.doctor(out, ("peft", "vllm", "sglang")))
    again = run.invoke(app, ["export", str(tmp_path / "adapter"), "--for", "vllm"], env=WIDE)
    assert again.exit_code == 2
