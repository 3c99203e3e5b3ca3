"""A layer's own output that something else holds stays as it was; one that nothing can hold is written into."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D
from zoo import LAYERS, PAIR_VARIANTS, perturb

import rankwise as rw
from rankwise.errors import AttachError
from rankwise.in_place import writable

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
VARIANTS = [*PAIR_VARIANTS, "bottleneck"]
kept: list[Tensor] = []


class Keeping(torch.autograd.Function):
    """As tanh does, it keeps its result for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradients[0] * (1 + 0 * y)


class Kept(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return Keeping.apply(super().forward(input))


class Remembering(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        kept.append(super().forward(input))
        return kept[-1]


class Itself(nn.Linear):
    """Returns its input once it is switched off."""

    off = False

    def forward(self, input: Tensor) -> Tensor:
        return input if self.off else super().forward(input)


def _keep(*call: Any) -> None:
    kept.append(call[-1])


@contextmanager
def hook_before(layer: nn.Module) -> Iterator[None]:
    """One that was there before the adapter's."""
    with layer.register_forward_hook(_keep, prepend=True):
        yield


@contextmanager
def hook_on_all(layer: nn.Module) -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, y: _keep(y) if module is layer else None)
    with handle:
        yield


@contextmanager
def patched_forward(layer: nn.Module) -> Iterator[None]:
    """As accelerate and many a notebook do."""
    forward = layer.forward

    def keeping(x: Tensor) -> Tensor:
        kept.append(forward(x))
        return kept[-1]

    layer.forward = keeping
    yield
    del layer.forward


class KeepsFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and not kept:
            kept.append(result)
        return result


class KeepsOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "addmm" in str(func) and not kept:
            kept.append(result)
        return result


HOLDERS: dict[str, tuple[type[nn.Linear], Callable[[nn.Module], Any]]] = {
    "a subclass": (Remembering, lambda layer: torch.enable_grad()),
    "a hook before": (nn.Linear, hook_before),
    "a hook on all modules": (nn.Linear, hook_on_all),
    "a forward that was replaced": (nn.Linear, patched_forward),
    "a mode that sees functions": (nn.Linear, lambda layer: KeepsFunctions()),
    "a mode that sees operators": (nn.Linear, lambda layer: KeepsOperators()),
}


def adapted(layer: nn.Module, variant: str, **spec: Any) -> nn.Module:
    model = rw.attach(nn.Sequential(layer), rw.LoRA(rank=2, target_modules=["0"], variant=variant, **spec))
    perturb(model, 0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_what_is_kept_is_the_layers_own_output(holder: str, variant: str, with_gradient: bool) -> None:
    kind, around = HOLDERS[holder]
    layer = kind(12, 10)
    model = adapted(layer, variant)
    own = nn.functional.linear(X, layer.weight, layer.bias)
    plain = model(X)
    assert not torch.allclose(plain, own)
    kept.clear()
    with torch.set_grad_enabled(with_gradient), around(layer):
        y = model(X)
    assert torch.equal(kept[0], own)
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", ["kaiming", "lora-ga"])
def test_a_subclass_that_saved_its_output_for_the_backward_pass(variant: str, init: str) -> None:
    if variant == "bottleneck" and init != "kaiming":
        pytest.skip("a bottleneck has a start of its own")
    layer = Kept(12, 10)
    model = nn.Sequential(nn.Linear(12, 12), layer, nn.Linear(10, 10))
    spec = rw.LoRA(rank=2, target_modules=["0", "1"], variant=variant, init=init)
    rw.attach(model, spec, batches=[X], loss=lambda model, x: model(x).square().sum())
    perturb(model, 0.3)
    model(X).square().sum().backward()
    found = [p.grad.clone() for p in rw.trainable_parameters(model)]
    y = layer._forward_hooks.popitem()[1](layer, (h := model[0](X),), {}, Kept.forward(layer, h).clone())
    expected = torch.autograd.grad(model[2](y).square().sum(), rw.trainable_parameters(model))
    for gradient, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, oracle)


@pytest.mark.parametrize("variant", PAIR_VARIANTS)
def test_a_layer_that_returns_its_input(variant: str) -> None:
    model = adapted(Itself(12, 12), variant)
    model[0].off = True
    x = X.clone()
    model(x)
    assert torch.equal(x, X)


@pytest.mark.parametrize("variant", PAIR_VARIANTS)
def test_selective_checkpointing_keeps_products(variant: str) -> None:
    model = adapted(nn.Linear(12, 10), variant)
    expected = torch.autograd.grad(model(X).sin().sum(), rw.trainable_parameters(model))
    saves = partial(create_selective_checkpoint_contexts, lambda *rest, **more: CheckpointPolicy.MUST_SAVE)
    y = checkpoint(lambda x: model(x).sin(), X, use_reentrant=False, context_fn=saves)
    for gradient, oracle in zip(torch.autograd.grad(y.sum(), rw.trainable_parameters(model)), expected, strict=True):
        torch.testing.assert_close(gradient, oracle)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(12, 10), type("Named", (nn.Linear,), {})(12, 10), Conv1D(10, 12), bnb.nn.Linear8bitLt(12, 10)],
    ids=lambda layer: type(layer).__name__,
)
def test_what_nothing_holds_is_written_into(layer: nn.Module) -> None:
    """Or every layer would need its output's memory twice."""
    model = nn.Sequential(deepcopy(layer))
    rw.attach(model, rw.LoRA(rank=2, target_modules=["0"]))
    y = torch.zeros(5, 10)
    assert writable(model[0], y) is y
    assert writable(LAYERS["linear"][0](), y) is not y


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_output_that_is_no_tensor_is_named(variant: str) -> None:
    class WithBias(nn.Linear):
        """Leaves it to the caller to add the bias once it is told to, as layers of tensor parallelism do."""

        apart = False

        def forward(self, input: Tensor) -> Any:
            return (nn.functional.linear(input, self.weight), self.bias) if self.apart else super().forward(input)

    spec = rw.Bottleneck(["0"], width=2) if variant == "bottleneck" else rw.LoRA(rank=2, variant=variant)
    model = rw.attach(nn.Sequential(WithBias(12, 12)), spec)
    model[0].apart = True
    with pytest.raises(AttachError, match=r"^0: its forward returned a tuple; expected one tensor"):
        model(X)
