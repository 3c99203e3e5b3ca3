"""plan: what a spec selects, and that it refuses what it cannot serve. It changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import LAYERS, left_as_it_was, zoo_and_inputs

import rankwise as rw
from rankwise.errors import SpecError, TargetError
from rankwise.variants import VARIANTS


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({n: nn.Linear(width, width) for n in ("q_proj", "k_proj", "v_proj")})
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))


class Model(nn.Module):
    """Embedding, blocks, a norm, a tied head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))


INNER = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.0", "mlp.2"]


def names(model: nn.Module, **fields: Any) -> list[str]:
    return [site.name for site in rw.plan(model, rw.LoRA(rank=2, **fields))]


def test_all_linear_takes_every_linear_layer_but_the_head():
    assert names(Model()) == [f"blocks.{i}.{n}" for i in range(2) for n in INNER]


def test_lists_regular_expressions_and_exclusions():
    model = Model()
    assert names(model, target_modules=["v_proj", "q_proj"]) == [
        "blocks.0.attn.q_proj", "blocks.0.attn.v_proj", "blocks.1.attn.q_proj", "blocks.1.attn.v_proj",
    ]  # fmt: skip
    assert names(model, target_modules=["1.attn.q_proj"]) == ["blocks.1.attn.q_proj"]
    assert names(model, target_modules=r"blocks\.1\..*_proj", exclude_modules=["k_proj"]) == [
        "blocks.1.attn.q_proj", "blocks.1.attn.v_proj",
    ]  # fmt: skip
    assert names(model, target_modules=["embed", "head"]) == ["embed", "head"]
    assert names(model, exclude_modules=r"blocks\.0\..*") == [f"blocks.1.{n}" for n in INNER]


def test_a_name_is_matched_by_whole_parts():
    with pytest.raises(TargetError, match=r"'proj' match no module"):
        names(Model(), target_modules=["proj"])


def test_a_site_says_kind_shape_rank_and_scale():
    zoo, _ = zoo_and_inputs()
    spec = rw.LoRA(
        rank=2, alpha=8, target_modules=list(LAYERS), rank_pattern={"conv.*": 4}, alpha_pattern={"linear": 3},
        scaling="rslora",
    )  # fmt: skip
    with left_as_it_was(zoo):
        plan = rw.plan(zoo, spec)
    found = {s.name: s for s in plan}
    assert (found["linear"].kind, found["linear"].shape, found["linear"].rank) == ("linear", (10, 12), 2)
    assert found["linear"].scale == pytest.approx(3 / 2**0.5)
    assert (found["conv1d"].kind, found["conv1d"].shape, found["conv1d"].rank) == ("conv1d", (10, 12), 4)
    assert (found["conv2d"].kind, found["conv2d"].shape) == ("conv2d", (8, 4 * 9))
    assert found["conv2d_grouped"].shape == (8, 2 * 9)
    assert found["conv2d"].scale == pytest.approx(8 / 4**0.5)
    assert (found["embedding"].kind, found["embedding"].shape) == ("embedding", (8, 11))
    assert plan.parameters == sum(s.rank * sum(s.shape) for s in plan)
    printed = str(plan)
    assert "conv2d_grouped" in printed and "8 × 18" in printed and f"{len(plan)} sites" in printed
    rw.attach(zoo, spec)
    assert sum(p.numel() for p in rw.trainable_parameters(zoo)) == plan.parameters


def test_a_pattern_key_matches_the_end_of_a_path_and_the_first_match_wins():
    ranks = {
        s.name: s.rank
        for s in rw.plan(
            Model(), rw.LoRA(rank=1, rank_pattern={r"1.attn.q_proj": 4, "q_proj": 3, r"^blocks.0.mlp.0": 5})
        )
    }
    assert ranks["blocks.1.attn.q_proj"] == 4
    assert ranks["blocks.0.attn.q_proj"] == 3
    assert ranks["blocks.0.mlp.0"] == 5
    assert ranks["blocks.1.mlp.0"] == 1


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target_modules": ["q_porj"]}, TargetError,
     r"target_modules: 'q_porj' match no module; did you mean 'q_proj'\?.*q_proj, k_proj"),
    ({"target_modules": ["q_proj", "w_q", "w_k"]}, TargetError,
     r"'w_q', 'w_k' match no module \(while 'q_proj' do\)"),
    ({"target_modules": "q_proj"}, TargetError,
     r"'q_proj' matches no module as a regular expression.*give a list such as \['q_proj'\]"),
    ({"target_modules": "(q_proj"}, TargetError,
     r"target_modules '\(q_proj' is not a regular expression"),
    ({"target_modules": ["norm"]}, TargetError,
     r"matches 'norm', a LayerNorm, which cannot carry an adapter.*Linear, Conv1D"),
    ({"target_modules": ["attn"]}, TargetError,
     r"matches 'blocks.0.attn', a ModuleDict, which cannot carry"),
    ({"exclude_modules": ["nope"]}, TargetError,
     r"exclude_modules: 'nope' match no module"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, TargetError,
     r"leaves no module to adapt after exclude_modules"),
    ({"rank_pattern": {"nope": 2}}, TargetError,
     r"rank_pattern key 'nope' matches none of the adapted modules"),
    ({"rank": 9}, SpecError,
     r"^blocks.0.attn.q_proj: rank 9 is larger than min\(out, in\) = 8 of its 8 × 8 weight.*lower rank"),
    ({"rank": 10**9}, SpecError,
     r"rank 1000000000 is larger than min\(out, in\) = 8"),
    ({"rank": 5, "init": "lora-ga"}, SpecError,
     r"^blocks.0.attn.q_proj: rank 5 with init LoraGA needs a matrix of at least 10 rows.*found 8 × 8; use rank ≤ 4"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "message"), BAD, ids=[repr(f)[:60] for f, _, _ in BAD])
def test_what_cannot_be_served_is_refused_and_the_model_left_alone(fields, error, message):
    model = Model().train()
    model.norm.eval()
    model.blocks[0].mlp[0].weight.requires_grad_(False)
    spec = rw.LoRA(**{"rank": 2, **fields})
    with left_as_it_was(model), pytest.raises(error, match=message):
        rw.plan(model, spec)
    with left_as_it_was(model), pytest.raises(error, match=message):
        rw.attach(model, spec, batches=[{"ids": torch.zeros(1, 2, dtype=torch.long)}])


def test_a_model_without_linear_layers():
    with pytest.raises(TargetError, match=r"'all-linear' matches nothing"):
        rw.plan(nn.Sequential(nn.LayerNorm(3)), rw.LoRA())
    with pytest.raises(TargetError, match=r"no adaptable module"):
        rw.plan(nn.Sequential(nn.ReLU()), rw.LoRA(target_modules=["x"]))


def test_a_model_that_is_itself_a_layer_is_refused_by_name():
    with pytest.raises(TargetError, match=r"the model is itself a Linear"):
        rw.plan(nn.Linear(4, 4), rw.LoRA(rank=2))


def test_a_shared_module_is_one_site():
    layer = nn.Linear(4, 4)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plan_counts_what_the_variant_trains(variant: str) -> None:
    names = ["linear", "wide", "conv1d"]
    zoo, _ = zoo_and_inputs(names=names)
    plan = rw.plan(zoo, rw.LoRA(rank=2, variant=variant, target_modules=names))
    rw.attach(zoo, rw.LoRA(rank=2, variant=variant, target_modules=names))
    assert plan.parameters == sum(p.numel() for p in rw.trainable_parameters(zoo))
    assert f"{plan.parameters:,}" in str(plan)
