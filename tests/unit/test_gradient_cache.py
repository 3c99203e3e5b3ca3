"""Gradients kept on disk: read again for the same weights, batches and settings, refused for others."""

from pathlib import Path

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import BrokenFile, EvidenceError, NonFiniteTensor

calls: list[int] = []


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))


def data(seed: int = 0) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(5, 12, generator=generator), "kind": ["a", 1, None]} for _ in range(3)]


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if torch.is_grad_enabled():  # a pass that collects; the loss is also valued once without
        calls.append(1)
    return model(batch["x"]).square().sum()


@pytest.fixture(params=["exact", "sketch"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    calls.clear()
    return {"method": request.param, "rank": 1, "loss": loss, "cache": tmp_path / "run" / "gradients.safetensors"}


def test_a_second_call_reads_what_the_first_collected(options: dict[str, object]) -> None:
    first = rw.gradients(network(), data(), **options)
    assert len(calls) == 3
    again = rw.gradients(network(), iter(data()), **options)
    assert len(calls) == 3
    assert set(again) == set(first)
    for name, evidence in first.items():
        assert type(again[name]) is type(evidence)
        assert again[name].energy == evidence.energy
        for ours, theirs in zip(again[name].svd(4), evidence.svd(4), strict=True):
            assert torch.equal(ours, theirs)


def test_other_weights_batches_or_settings_are_refused(options: dict[str, object]) -> None:
    rw.gradients(network(), data(), **options)
    before = options["cache"].read_bytes()
    other = {"exact": "sketch", "sketch": "exact"}[options["method"]]
    cases = [
        (network(1), data(), {}, "other base weights"),
        (network(), data(1), {}, "other batches"),
        (network(), data()[:2], {}, "other batches"),
        (network(), data(), {"method": other}, "other settings.*expected.*found"),
        (network(), data(), {"target_modules": ["0"]}, "other settings"),
        (network(), data(), {"loss": lambda model, batch: 100.0 * loss(model, batch)}, "another loss"),
    ]
    for model, batches, change, message in cases:
        with pytest.raises(EvidenceError, match=message):
            rw.gradients(model, batches, **(options | change))
    assert options["cache"].read_bytes() == before
    assert len(calls) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_collection_leaves_no_trace(options: dict[str, object], error: type[BaseException]) -> None:
    model = network().train()
    model[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]

    def interrupted(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(calls) == 2:
            raise error
        return loss(model, batch)

    with pytest.raises(error):
        rw.gradients(model, data(), **(options | {"loss": interrupted}))
    folder = options["cache"].parent
    assert not folder.exists() or not list(folder.iterdir())
    assert [p.requires_grad for p in model.parameters()] == flags and all(m.training for m in model.modules())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


def test_files_that_are_no_cache_are_named(options: dict[str, object], tmp_path: Path) -> None:
    path = options["cache"]
    rw.gradients(network(), data(), **options)
    whole = path.read_bytes()
    for content in (b"", b"no", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(BrokenFile, match=str(path)):
            rw.gradients(network(), data(), **options)
    adapter = rw.attach(network(), rw.LoRA(rank=1))
    rw.save(adapter, tmp_path / "adapter")
    with pytest.raises(BrokenFile, match="not a file of cached gradients"):
        rw.gradients(network(), data(), **(options | {"cache": tmp_path / "adapter" / "adapter_model.safetensors"}))


def test_nan_in_a_cache_is_refused(options: dict[str, object]) -> None:
    rw.gradients(network(), data(), **options)
    path = options["cache"]
    content = bytearray(path.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(NonFiniteTensor):
        rw.gradients(network(), data(), **options)


def test_content_without_a_defined_hash_is_named(options: dict[str, object]) -> None:
    with pytest.raises(EvidenceError, match="a batch holds a object, which has no defined content"):
        rw.gradients(network(), [{"x": object()}], **options)
