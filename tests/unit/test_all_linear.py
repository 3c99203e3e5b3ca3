"""What "all-linear" takes on models where that is no matter of course, and what it says it leaves out."""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

import rankwise as rw
from rankwise.errors import NoGradient, SiteNeverFired, SpecError, TargetError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def names(model: nn.Module, **spec: Any) -> list[str]:
    return [site.name for site in rw.plan(model, rw.LoRA(**{"rank": 2, **spec}))]


def test_of_a_convnet_its_convolutions() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3, layer_type="basic")
    model = ResNetForImageClassification(config).eval()
    planned = rw.plan(model, rw.LoRA(rank=2))
    assert {site.kind for site in planned} == {"conv2d"}
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [site.name for site in planned] == convolutions
    assert "classifier.1" in str(planned)
    x = torch.randn(2, 3, 16, 16)
    before = model(x).logits
    rw.attach(model, rw.LoRA(rank=2, init="lora-ga"), batches=[x], loss=lambda m, b: m(b).logits.square().mean())
    assert torch.equal(model(x).logits, before)


def test_a_convolution_too_small_for_the_rank_is_left_out_and_said() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    planned = rw.plan(model, rw.LoRA(rank=4))
    assert [site.name for site in planned] == ["2"]
    assert "left out: 0, too small for the rank" in str(planned)
    with pytest.raises(SpecError, match="rank 99"):
        rw.plan(model, rw.LoRA(rank=99))


class Router(nn.Linear):
    """As in some mixtures of experts: it returns more than one tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Mixture(nn.Module):
    """A router, a gate of one number, and two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.gate = Router(6, 2), nn.Linear(6, 1)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x)[0]
        y = share[:, :1] * self.one(x) + share[:, 1:] * self.other(x)
        return self.out(y * self.gate(x).sigmoid())


def test_routers_and_gates_are_left_out_and_said() -> None:
    planned = rw.plan(Mixture(), rw.LoRA(rank=2))
    assert [site.name for site in planned] == ["one", "other", "out.0", "out.1"]
    assert "left out: router, a Router, whose forward is more than x Wᵀ + b" in str(planned)
    assert "left out: gate, too small for the rank" in str(planned)
    model = Mixture()
    before = model(X)
    rw.attach(model, rw.LoRA(rank=2, init="lora-ga"), batches=[X], loss=lambda m, x: m(x).square().mean())
    assert torch.equal(model(X), before)


class Grouped(nn.Linear):
    """Two halves of the input, each with its own rows of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([half @ rows.T for half, rows in zip(x.chunk(2, -1), self.weight.chunk(2), strict=True)], -1)


class Spelt(nn.Linear):
    """The product in other words."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_layer_with_a_forward_of_its_own_is_tried(device: str) -> None:
    model = nn.Sequential(Spelt(6, 8), Grouped(4, 8, bias=False), nn.Linear(8, 5)).to(device)
    assert names(model) == ["0", "2"]
    for layer in (Grouped, Router):
        with pytest.raises(TargetError, match=f"'0', a {layer.__name__}, which cannot carry an adapter"):
            rw.plan(nn.Sequential(layer(6, 8), nn.Linear(8, 5)).to(device), rw.LoRA(rank=2, target_modules=["0"]))


def test_a_convolution_with_a_forward_of_its_own_is_refused_by_name() -> None:
    class SamePadding(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    model = nn.Sequential(SamePadding(3, 8, 2), nn.Conv2d(8, 8, 3))
    assert names(model) == ["1"]
    with pytest.raises(TargetError, match="'0', a SamePadding, which cannot carry an adapter"):
        rw.plan(model, rw.LoRA(rank=2, target_modules=["0"]))


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return BertModel(config).eval(), {"input_ids": torch.randint(0, 30, (2, 6))}


def _hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    y: Tensor = model(**batch).last_hidden_state
    return y[..., 0].square().mean()


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_a_pooler_that_no_gradient_reaches_is_left_out_and_said(
    method: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, batch = _bert()
    fresh = deepcopy(model)
    spec = rw.LoRA(rank=2, init="lora-ga")
    with caplog.at_level(logging.WARNING):
        rw.attach(model, spec, batches=[batch], loss=_hidden, method=method)
    assert "left out of all-linear: pooler.dense, which no gradient reached" in caplog.text
    assert "pooler.dense" in names(fresh) and "pooler.dense" not in [pair.name for pair in rw.pairs(model)]
    rw.save(model, tmp_path)
    rw.load(fresh, tmp_path)
    named = rw.LoRA(rank=2, init="lora-ga", target_modules=["query", "pooler.dense"])
    with pytest.raises(NoGradient, match=r"pooler\.dense"):
        rw.attach(_bert()[0], named, batches=[batch], loss=_hidden, method=method)


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_no_gradient_anywhere_is_an_error(method: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(NoGradient):
        rw.attach(
            model, rw.LoRA(rank=2, init="lora-ga"), batches=[X], method=method, loss=lambda m, x: 0.0 * m(x).sum()
        )


def test_attention_of_torch_keeps_its_out_projection() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    planned = rw.plan(model, rw.LoRA(rank=2))
    assert [site.name for site in planned] == ["linear1", "linear2"]
    assert "left out: self_attn.out_proj, whose weight nn.MultiheadAttention uses without calling it" in str(planned)


class Past(nn.Module):
    """One layer is called, of another the weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight, self.read.bias)


def test_a_layer_whose_weight_is_used_without_calling_it_is_left_out_and_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, fresh = Past(), Past()
    fresh.load_state_dict(model.state_dict())
    before = model(X)
    rw.attach(model, rw.LoRA(rank=2))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(X), before)
    assert "left out of all-linear: read, whose weight the model uses without calling the layer" in caplog.text
    assert [pair.name for pair in rw.pairs(model)] == ["called"]
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1)
    rw.save(model, tmp_path)
    torch.testing.assert_close(rw.load(fresh, tmp_path)(X), model(X))
    rw.detach(model)
    assert torch.equal(model(X), before)


def test_one_that_was_named_or_trained_is_an_error() -> None:
    model = rw.attach(Past(), rw.LoRA(rank=2, target_modules=["called", "read"]))
    with pytest.raises(SiteNeverFired, match="read"):
        model(X)
    model = rw.attach(Past(), rw.LoRA(rank=2))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1)
    with pytest.raises(SiteNeverFired, match="read"):
        model(X)
