"""Parametrised weights, nested tensors and inference mode: the right values, or a refusal by name."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm
from zoo import PAIR_VARIANTS, perturb

import rankwise as rw
from rankwise.errors import AttachError, MergeError

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
VARIANTS = [*PAIR_VARIANTS, "bottleneck"]


def network() -> Any:
    torch.manual_seed(0)
    layers = {"down": nn.Linear(12, 10), "tanh": nn.Tanh(), "up": nn.Linear(10, 12)}
    return nn.Sequential(OrderedDict(layers)).eval()


def adapted(model: Any, variant: str = "lora", **spec: Any) -> Any:
    rw.attach(model, rw.LoRA(rank=2, variant=variant, **{"target_modules": ["down", "up"], **spec}))
    perturb(model, 0.3)
    return model


# ------------------------------------------------------------------------------------------------ computed weights

Change = Callable[[nn.Module], Any]
COMPUTED: dict[str, tuple[Change, Change]] = {
    "spectral": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "weight": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "orthogonal": (parametrizations.orthogonal, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "old spectral": (spectral_norm, remove_spectral_norm),
    "old weight": (weight_norm, remove_weight_norm),
}
pytestmark = pytest.mark.filterwarnings("ignore:.torch.(nn.utils.weight_norm).* is deprecated")


@torch.no_grad()
def computing(computed: str) -> Any:
    """The network with a first weight that is computed from others, brought up to date by a forward."""
    model = network()
    COMPUTED[computed][0](model.down)
    model(X)
    return model


@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize("variant", PAIR_VARIANTS)
def test_a_weight_that_is_computed_from_others(computed: str, variant: str, tmp_path: Path) -> None:
    """Adapted as any; folded into only once it is a parameter."""
    model = adapted(computing(computed), variant)
    rw.save(model, tmp_path)
    expected = model(X)
    torch.testing.assert_close(rw.load(computing(computed), tmp_path)(X), expected)
    with pytest.raises(MergeError, match=r"^down: its weight is computed from other tensors"):
        rw.merge(model)
    assert torch.equal(model(X), expected)
    settled = computing(computed)
    COMPUTED[computed][1](settled.down)
    torch.testing.assert_close(rw.load(settled, tmp_path)(X), expected, atol=1e-5, rtol=1e-4)
    rw.merge(settled)
    torch.testing.assert_close(settled(X), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("computed", COMPUTED)
def test_a_start_is_not_folded_into_a_computed_weight(computed: str) -> None:
    model = computing(computed)
    with pytest.raises(AttachError, match=r"^down: its weight is computed.*or use anchor='frozen'"):
        rw.attach(model, rw.LoRA(rank=2, init="pissa", anchor="fold"))
    assert torch.equal(model(X), computing(computed)(X))


# -------------------------------------------------------------------------------------------------- nested tensors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout, variant: str) -> None:
    model = adapted(network(), variant)
    rows = [X[:2], X[:5]]
    with torch.no_grad():
        found = model(torch.nested.nested_tensor(rows, layout=layout)).unbind()
        for row, y in zip(rows, found, strict=True):
            torch.testing.assert_close(y, model(row))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_through_jagged_tensors(variant: str) -> None:
    model, rows = adapted(network(), variant), [X[:2], X[:5]]
    parameters = rw.trainable_parameters(model)
    found = torch.autograd.grad(
        model(torch.nested.nested_tensor(rows, layout=torch.jagged)).values().sin().sum(), parameters
    )
    expected = torch.autograd.grad(model(torch.cat(rows)).sin().sum(), parameters)
    for gradient, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, oracle, atol=1e-5, rtol=1e-4)


def encoder(variant: str) -> Any:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    return adapted(model, variant, target_modules=["linear1", "linear2"])


SEQUENCES = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4))
PADDING = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_makes_nested_tensors_of_its_padding(variant: str, mode: Callable[[], Any]) -> None:
    """In evaluation mode; and no fast path goes past the adapters."""
    model = encoder(variant)
    with torch.no_grad():
        expected = model(SEQUENCES, src_key_padding_mask=PADDING)[~PADDING]  # in training mode it makes none
        with rw.disabled(model):
            pretrained = model(SEQUENCES, src_key_padding_mask=PADDING)[~PADDING]
    model.eval()
    with mode():
        found = model(SEQUENCES, src_key_padding_mask=PADDING)[~PADDING]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        with rw.disabled(model):
            off = model(SEQUENCES, src_key_padding_mask=PADDING)[~PADDING]
    torch.testing.assert_close(off, pretrained, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, off, atol=1e-2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_gradient_passes_an_encoders_nested_tensors() -> None:
    model = encoder("lora").eval()
    with pytest.raises(AttachError, match=r"^layers.0.linear1: found a nested tensor.*enable_nested_tensor=False"):
        model(SEQUENCES, src_key_padding_mask=PADDING)
    model.train()(SEQUENCES, src_key_padding_mask=PADDING).sum().backward()
    assert all(p.grad is not None for p in rw.trainable_parameters(model))


# -------------------------------------------------------------------------------------------------- inference mode


def trains(model: Any) -> None:
    """Twice, as what was kept from a forward under inference mode would show in the second."""
    for _ in range(2):
        model.zero_grad()
        model(X).square().sum().backward()
        assert all(p.grad is not None for p in rw.trainable_parameters(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attached_or_loaded_in_inference_mode_it_can_be_trained(variant: str, tmp_path: Path) -> None:
    model = network()
    with torch.inference_mode():
        rw.attach(model, rw.LoRA(rank=2, variant=variant, target_modules=["down"], modules_to_save=["up"]))
        model(X)
    trains(model)
    rw.save(model, tmp_path)
    fresh = network()
    with torch.inference_mode():
        rw.load(fresh, tmp_path, trainable=True)
        expected = fresh(X)
    torch.testing.assert_close(model(X), expected)
    trains(fresh)


@pytest.mark.parametrize("init", ["pissa", "lora-ga", "eva"])
def test_a_start_that_is_collected_in_inference_mode(init: str) -> None:
    models = [network(), network()]
    for model, mode in zip(models, (True, False), strict=True):
        with torch.inference_mode(mode):
            rw.attach(model, rw.LoRA(rank=2, init=init), batches=[X], loss=lambda model, x: model(x).square().sum())
        trains(model)
    for a, b in zip(*(rw.trainable_parameters(model) for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", PAIR_VARIANTS)
def test_merged_in_inference_mode_gradients_pass(variant: str) -> None:
    model = adapted(network(), variant)
    expected = model(X)
    with torch.inference_mode():
        rw.merge(model)
        torch.testing.assert_close(model(X), expected)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.any()
    rw.unmerge(model)
    trains(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_from_inference_mode(variant: str) -> None:
    model = adapted(network(), variant)
    expected = torch.autograd.grad(model(X).sin().sum(), rw.trainable_parameters(model))
    with torch.inference_mode():
        x = X.clone()
    found = torch.autograd.grad(model(x).sin().sum(), rw.trainable_parameters(model))
    for gradient, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, oracle)


def test_a_base_from_inference_mode_is_for_inference(tmp_path: Path) -> None:
    source = adapted(network())
    rw.save(source, tmp_path)
    with torch.inference_mode():
        model = network()
    for call in (lambda: rw.attach(model, rw.LoRA(rank=2)), lambda: rw.load(model, tmp_path, trainable=True)):
        with pytest.raises(AttachError, match=r"^down\.weight: expected a tensor that gradients can pass"):
            call()
    with torch.inference_mode():
        torch.testing.assert_close(rw.load(model, tmp_path)(X), source(X))
