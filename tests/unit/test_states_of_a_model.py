"""Calls in unusual orders, and arguments that do not fit: named errors, and nothing half done."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.errors import AttachError, BaseMismatch, BrokenFile, EvidenceError, SpecError, SpecMismatch
from rankwise.format.state import load_state, save_state

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))


def trained(model: nn.Module) -> nn.Module:
    """Moved off its start."""
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1)
    return model


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


def flags(model: nn.Module) -> list[object]:
    return [
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [(name, len(m._forward_hooks), m.training) for name, m in model.named_modules()],
    ]


def test_a_lora_does_not_adapt_a_bottleneck() -> None:
    model = rw.attach(network(), rw.Bottleneck(["0", "2"], width=4), name="narrow")
    rw.attach(model, rw.LoRA(rank=2), name="low")
    assert [pair.name for pair in rw.pairs(model)] == ["0", "2", "4"]
    rw.activate(model, ["low", "narrow"])
    assert list(rw.gradients(model, [X], loss=loss)) == ["0", "2", "4"]


@pytest.mark.parametrize("name", [None, "default"])
def test_detach_waits_for_the_end_of_disabled(name: str | None) -> None:
    model = rw.attach(network(), rw.LoRA(rank=2, init="pissa", anchor="fold"))
    with rw.disabled(model), pytest.raises(AttachError, match="leave the block of rankwise"):
        rw.detach(model, name)
    rw.detach(model)
    for ours, theirs in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_attached_or_activated_while_disabled_takes_part_afterwards() -> None:
    model = network()
    pretrained = model(X).detach()
    outputs = {}
    for name in ("first", "second"):
        rw.attach(model, rw.LoRA(rank=2, target_modules=["0"], modules_to_save=["4"]), name=name)
        outputs[name] = trained(model)(X).detach()
    with rw.disabled(model):
        rw.activate(model, "first")
        assert torch.equal(model(X), pretrained)
    assert torch.equal(model(X), outputs["first"])
    with rw.disabled(model):
        rw.attach(model, rw.LoRA(rank=2, target_modules=["0", "2"], modules_to_save=["4"]), name="third")
        trained(model)
        assert torch.equal(model(X), pretrained)
    third = model(X).detach()
    assert not torch.allclose(third, pretrained)
    rw.activate(model, "first")
    assert torch.equal(model(X), outputs["first"])
    assert torch.equal(rw.activate(model, "third")(X), third)


def test_a_file_s_targets_are_layers_of_the_base_and_not_of_a_bottleneck(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}))

    rw.save(rw.attach(model(), rw.LoRA(rank=2, target_modules=["down"])), tmp_path / "alone")
    both = rw.attach(model(), rw.Bottleneck(["up"], width=2), name="narrow")
    rw.load(both, tmp_path / "alone", name="low")
    rw.save(both, tmp_path / "beside", name="low")
    for folder in ("alone", "beside"):
        assert '"down"' in (tmp_path / folder / "adapter_config.json").read_text()


@pytest.mark.parametrize("name", ["training", "_modules", "_forward_hooks", "keys", "", "a.b"])
def test_names_that_no_adapter_can_have(name: str) -> None:
    model = network()
    before = flags(model)
    with pytest.raises(AttachError, match="cannot be used"):
        rw.attach(model, rw.LoRA(rank=2), name=name)
    assert flags(model) == before


def test_only_options_are_offered_as_options() -> None:
    with pytest.raises(SpecError, match=r"known: \['align', 'directions', 'gamma', 'scale'\]; did you mean 'gamma'"):
        rw.LoRA(init={"name": "lora-ga", "gama": 1})


def test_evidence_of_other_layers_or_kinds_is_named() -> None:
    found = rw.gradients(network(), [X], loss=loss)
    swapped = dict(found) | {"0": found["2"], "2": found["0"]}
    cases = [
        ("lora-ga", swapped, "evidence is that of another layer"),
        ("eva", found, "Eva starts from activations, found a ExactGradient"),
        ("corda", dict.fromkeys(found, 1), "Corda starts from covariance, found a int"),
        ("lora-ga", dict.fromkeys(found, 1), "LoraGA starts from gradients, found a int"),
    ]
    for init, evidence, message in cases:
        model = network()
        before = flags(model)
        with pytest.raises(EvidenceError, match=message):
            rw.attach(model, rw.LoRA(rank=2, init=init), evidence=evidence)
        assert flags(model) == before


@pytest.mark.parametrize(
    ("batches", "value", "message"),
    [
        ([X], lambda model, batch: 1.0, "batch 0: the loss is a float; expected a tensor of one number"),
        ([X], lambda model, batch: model(batch)[0], r"the loss is a tensor of shape \(8,\)"),
    ],
)
def test_losses_that_are_none(batches: object, value: object, message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        rw.attach(network(), rw.LoRA(rank=2, init="lora-ga"), batches=batches, loss=value)


def test_a_budget_of_nothing_is_a_budget() -> None:
    with pytest.raises(EvidenceError, match="expected at most memory_budget=0"):
        rw.attach(network(), rw.LoRA(rank=2, init="lora-ga"), batches=[X], loss=loss, method="exact", memory_budget=0)


def test_a_bottleneck_draws_nothing_from_the_global_state() -> None:
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4))
    torch.manual_seed(3)
    rw.attach(model, rw.Bottleneck(["1"], width=2))
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_probe": {"zz": [0.0] * 16}}, BaseMismatch, "records base weights of 'zz'"),
        ({"base_probe": {"1": [0.0] * 16}}, BaseMismatch, "records base weights of '1'"),
        ({"base_probe": {"0": [1.0, 2.0, 3.0]}}, BrokenFile, "expected 16 finite numbers"),
        ({"base_probe": {"0": [float("nan")] * 16}}, BrokenFile, "expected 16 finite numbers"),
        ({"base_probe": None}, BrokenFile, "expected 16 finite numbers"),
        ({"sites": [{"a": 1}]}, BrokenFile, "expected a list of module names under sites"),
        ({"format_version": 99}, BrokenFile, "format_version is 99, expected 1"),
    ],
)
def test_a_record_of_the_base_that_is_none(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    import json

    rw.save(rw.attach(network(), rw.LoRA(rank=2)), tmp_path)
    path = tmp_path / "rankwise.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = network()
    before = flags(model)
    with pytest.raises(error, match=message):
        rw.load(model, tmp_path)
    assert flags(model) == before


def test_a_run_does_not_go_on_with_another_spec(tmp_path: Path) -> None:
    save_state(rw.attach(network(), rw.LoRA(rank=2, alpha=16)), tmp_path)
    other = rw.attach(network(), rw.LoRA(rank=2, alpha=640))
    with pytest.raises(SpecMismatch, match=r"saved with alpha=16.*, this adapter has 640"):
        load_state(other, tmp_path)


def test_tied_modules_trained_whole_can_be_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)
    ids = torch.arange(6)[None]
    model = LlamaForCausalLM(config).eval()
    fresh = LlamaForCausalLM(config).eval()
    fresh.load_state_dict(model.state_dict())
    rw.attach(model, rw.LoRA(rank=2, modules_to_save=["embed_tokens", "lm_head"]))
    trained(model)
    rw.save(model, tmp_path)
    rw.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(ids).logits, model(ids).logits)
