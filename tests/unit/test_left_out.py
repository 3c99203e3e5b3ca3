"""What "all-linear" leaves out: a classifier's new head, and weights that belong to no layer; it says so."""

import io
import logging
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from zoo import left_as_it_was

import rankwise as rw
from rankwise.errors import SpecError
from rankwise.train.recipe import Recipe
from rankwise.train.run.loading import show_plan
from rankwise.train.tasks.base import Loaded

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


class Heads(nn.Module):
    """A body, then a head for each task, before or behind them one with many outputs."""

    def __init__(self, *outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 16))
        self.heads = nn.ModuleList(nn.Linear(16, out) for out in outputs)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(self.body(x)) for head in self.heads]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))


CLASSIFIERS: dict[str, tuple[Any, list[str]]] = {
    "mlp": (mlp, ["2"]),
    "tasks": (lambda: Heads(3, 2, 30), ["heads.0", "heads.1"]),
    "llama": (lambda: LlamaForSequenceClassification(LlamaConfig(vocab_size=30, num_labels=2, **SIZES)), ["score"]),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(vocab_size=30, num_labels=2, **SIZES)),
        ["classifier.dense", "classifier.out_proj"],
    ),
    "many labels": (
        lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=12, **SIZES)),
        ["classifier"],
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_an_ordinary_classifier_takes_the_default(name: str, init: str, caplog: pytest.LogCaptureFixture) -> None:
    make, heads = CLASSIFIERS[name]
    model = make()
    spec = rw.LoRA(init=init)
    with left_as_it_was(model):
        plan = rw.plan(model, spec)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [site.name for site in plan] == [path for path in linear if path not in heads]
    for head in heads:
        assert f"modules_to_save=['{head}']" in str(plan)
    with caplog.at_level(logging.WARNING):
        rw.attach(model, spec)
    assert all(f"modules_to_save=['{head}']" in caplog.text for head in heads)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_trained_whole_needs_no_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, heads = CLASSIFIERS[name]
    model = make()
    with caplog.at_level(logging.WARNING):
        rw.attach(model, rw.LoRA(modules_to_save=heads))
    assert not caplog.records
    trained = {name.partition(".rankwise")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert set(heads) <= trained | {name.rpartition(".")[0] for name in trained}
    assert not rw.plan(make(), rw.LoRA(exclude_modules=heads)).left_out


def test_a_head_that_was_given_a_rank_is_adapted() -> None:
    assert [site.name for site in rw.plan(mlp(), rw.LoRA(rank_pattern={"2": 2}))] == ["0", "2"]


def test_only_heads_are_left_out() -> None:
    """Where the body is too narrow, the rank is wrong."""
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SIZES))
    for model, first in (
        (nn.Sequential(nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 20)), "0"),
        (llama, "model.layers.0.self_attn.k_proj"),
        (nn.Sequential(nn.Linear(20, 2)), "0"),
    ):
        rank = 12 if isinstance(model, LlamaForCausalLM) else 8
        with pytest.raises(SpecError, match=rf"^{first}: rank {rank} is larger than min"):
            rw.plan(model, rw.LoRA(rank=rank))
    with pytest.raises(SpecError, match=r"^2: rank 8 is larger than min"):
        rw.plan(mlp(), rw.LoRA(target_modules=["0", "2"]))


def test_language_models_need_no_word() -> None:
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=30, **SIZES))
    bert = BertForMaskedLM(BertConfig(vocab_size=30, **SIZES))
    for model in (llama, bert):
        assert not rw.plan(model, rw.LoRA(rank=2)).left_out
    assert "cls.predictions.transform.dense" in [site.name for site in rw.plan(bert, rw.LoRA(rank=2))]


def test_fused_experts_are_said(caplog: pytest.LogCaptureFixture) -> None:
    config = Qwen3MoeConfig(
        vocab_size=30, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, head_dim=8, **SIZES
    )
    model = Qwen3MoeForCausalLM(config)
    weights = sum(p.numel() for p in model.parameters())
    up, down = 2 * 4 * 24 * 16, 2 * 4 * 16 * 12
    printed = str(rw.plan(model, rw.LoRA(rank=2)))
    for line in (
        f"2 × model.layers.*.mlp.experts.gate_up_proj (4 × 24 × 16), {up / weights:.0%} of the weights: experts fused",
        f"2 × model.layers.*.mlp.experts.down_proj (4 × 16 × 12), {down / weights:.0%} of the weights: experts fused",
    ):
        assert line in printed
    with caplog.at_level(logging.WARNING):
        rw.attach(model, rw.LoRA(rank=2))
    assert "left out of all-linear: 2 × model.layers.*.mlp.experts.down_proj" in caplog.text
    assert not rw.plan(model, rw.LoRA(rank=2, target_modules=["q_proj"])).left_out


def test_the_run_says_so_before_it_begins() -> None:
    sites, console = rw.plan(mlp(), rw.LoRA()), Console(record=True, width=200, file=io.StringIO())
    recipe = create_autospec(Recipe, instance=True, optimizer="adamw", learning_rate="auto")
    loaded = create_autospec(Loaded, instance=True, sites=sites, recipe=recipe)
    loaded.spec = rw.LoRA()
    show_plan(loaded, console)
    assert "Left out: 2 (2 × 64), a head; to train it whole: modules_to_save=['2']" in console.export_text()


def test_attention_that_keeps_its_projections_in_one_tensor_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    plan = rw.plan(model, rw.LoRA(rank=2))
    share = 24 * 8 / sum(p.numel() for p in model.parameters())
    note = plan.left_out[-1]
    assert note == f"1 × 1.in_proj_weight (24 × 8), {share:.0%} of the weights: a tensor of its own, not a linear layer"


def test_an_adapted_classifier_with_its_head_is_the_merged_one() -> None:
    model = rw.attach(mlp(), rw.LoRA(modules_to_save=["2"]))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1)
    x = torch.randn(5, 20)
    expected = model(x)
    rw.merge(model)
    torch.testing.assert_close(model(x), expected)
