"""Exact gradients within a memory budget, the choice of a method, and checkpointed activations."""

import logging

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw

DATA = [torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 8))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


@pytest.mark.parametrize("budget", [None, 4 * 16 * 20, 4 * (12 * 16 + 16 * 20), 10**6])
@pytest.mark.parametrize("batches", [DATA, iter(DATA)])
def test_gradients_do_not_depend_on_the_grouping(budget: int | None, batches: object) -> None:
    whole = rw.gradients(network(), DATA, loss=loss)
    found = rw.gradients(network(), batches if budget is None else list(DATA), loss=loss, memory_budget=budget)
    assert list(found) == list(whole) == ["0", "2", "4"]
    for name, evidence in whole.items():
        torch.testing.assert_close(found[name].matrix, evidence.matrix)


def test_groups_need_a_pass_each_and_may_be_given_a_generator() -> None:
    calls: list[int] = []

    def counted(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(model, batch)

    rw.gradients(network(), iter(DATA), loss=counted, memory_budget=4 * 16 * 20)
    assert len(calls) == 3 * len(DATA)


@pytest.mark.parametrize("align", ["sgd", "adam"])
def test_a_start_does_not_depend_on_the_grouping(align: str) -> None:
    starts = []
    for budget in (None, 4 * 16 * 20):
        spec = rw.LoRA(rank=2, init=rw.inits.LoraGA(align=align))
        model = rw.attach(network(), spec, batches=iter(DATA), loss=loss, method="exact", memory_budget=budget)
        starts.append({pair.name: (pair.A, pair.B) for pair in rw.pairs(model)})
    assert list(starts[0]) == list(starts[1])
    for name, (A, B) in starts[0].items():
        torch.testing.assert_close(starts[1][name][0], A)
        torch.testing.assert_close(starts[1][name][1], B)


def test_a_layer_that_exceeds_the_budget_alone_is_named_and_nothing_is_attached() -> None:
    model = network()
    with pytest.raises(rw.errors.EvidenceError, match=r"^2: its exact gradient alone takes 1280 bytes.*=1000"):
        rw.attach(model, rw.LoRA(rank=2, init="lora-ga"), batches=DATA, loss=loss, method="exact", memory_budget=1000)
    with pytest.raises(rw.errors.AttachError):
        rw.pairs(model)


def test_auto_takes_exact_gradients_where_they_fit_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rankwise")
    found = rw.gradients(network(), DATA, method="auto", loss=loss)
    assert type(found["0"]).__name__ == "ExactGradient"
    assert "exact gradients for 3 sites: the exact ones take 0.00 GiB for 3 layers" in caplog.text
    found = rw.gradients(network(), DATA, method="auto", rank=2, loss=loss, memory_budget=1000)
    assert type(found["0"]).__name__ == "SketchedGradient"
    assert "sketched gradients for 3 sites: the exact ones take" in caplog.text


def test_attach_sketches_where_the_gradients_do_not_fit() -> None:
    spec = rw.LoRA(rank=2, init=rw.inits.LoraGA(scale="unit"), rank_pattern={"2": 3})
    exact = rw.attach(network(), spec, batches=DATA, loss=loss)
    sketched = rw.attach(network(), spec, batches=DATA, loss=loss, memory_budget=1000)
    for ours, theirs in zip(rw.pairs(exact), rw.pairs(sketched), strict=True):
        assert ours.A.shape == theirs.A.shape
        cosines = torch.linalg.svdvals(ours.B.detach().T @ theirs.B.detach())  # of the angles between the subspaces
        assert float(cosines.min()) > 0.9


def test_a_start_that_needs_whole_gradients_refuses_sketches() -> None:
    spec = rw.LoRA(rank=2, init=rw.inits.LoraGA(align="sign"))
    with pytest.raises(rw.errors.EvidenceError, match="needs the gradients themselves"):
        rw.attach(network(), spec, batches=DATA, loss=loss, method="sketch")
    rw.attach(network(), spec, batches=DATA, loss=loss, method="auto", memory_budget=4 * 16 * 20)


def test_gradients_are_added_up_where_asked() -> None:
    found = rw.gradients(network(), DATA, loss=loss, device="cpu")
    assert found["0"].matrix.device.type == "cpu"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_checkpointed_activations_stay_checkpointed_and_change_nothing(method: str) -> None:
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    plain = rw.gradients(llama(), [batch] * 2, method=method, rank=2)
    model, runs = llama().train(), []
    model.activation_checkpointing_enable()
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: runs.append(1))
    found = rw.gradients(model, [batch] * 2, method=method, rank=2)
    assert len(runs) == 4  # each batch's forward, and again in its backward
    assert model.training and all(module.training for module in model.modules())
    for name, evidence in plain.items():
        torch.testing.assert_close(found[name].svd(4)[1], evidence.svd(4)[1], rtol=1e-4, atol=1e-7)
