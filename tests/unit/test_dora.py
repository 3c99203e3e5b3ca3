"""DoRA against its definition: the dense weight m ⊙ (W + ΔW)/‖W + ΔW‖ in fp64, its norm a constant for autograd."""

from copy import deepcopy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import AttachError, MissingTensor, ShapeMismatch, UnexpectedTensor
from rankwise.variants.dora import MAGNITUDE, DoraLayer, row_norms

OUT, IN, RANK = 48, 64, 4


def attached(layer: nn.Module, size: float = 0.1, **spec: Any) -> tuple[nn.Module, DoraLayer]:
    """A model of one layer whose DoRA adapter has been moved as training would."""
    model = rw.attach(nn.Sequential(layer), rw.LoRA(rank=RANK, variant="dora", target_modules=["0"], **spec))
    adapter = Adapted.of(model).adapter_layers("default")["0"]
    assert isinstance(adapter, DoraLayer)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model, adapter


def literal(layer: Any, adapter: DoraLayer, x: Tensor) -> Tensor:
    """The paper's equation 11 in fp64, differentiable in the adapter's tensors."""
    turned = layer.weight.detach().double() + adapter.scale * (
        adapter.B.double() @ adapter.A.double()
        - (0 if adapter.start_A is None else adapter.start_B.double() @ adapter.start_A.double())
    )
    norm = turned.detach().norm(dim=1, keepdim=True)
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), adapter.magnitude.double()[:, None] * turned / norm, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_output_and_gradients_are_the_definitions(init: str, bias: bool) -> None:
    model, adapter = attached(nn.Linear(IN, OUT, bias=bias), init=init)
    x = torch.randn(7, IN, requires_grad=True)
    wanted = literal(model[0], adapter, x)
    weights = torch.randn(7, OUT)
    targets = [x, *adapter.parameters()]
    expected = torch.autograd.grad((wanted * weights).sum(), targets)
    found = torch.autograd.grad((model(x) * weights).sum(), targets)
    torch.testing.assert_close(model(x), wanted.float(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-4)])
def test_factored_norm_is_the_dense_norm(dtype: torch.dtype, limit: float, init: str) -> None:
    layer = nn.Linear(512, 256).to(dtype)
    _, adapter = attached(layer, init=init)
    found, _ = adapter.norm(layer)
    delta = adapter.delta()
    dense = (layer.weight.double() + delta.scale * delta.B.double() @ delta.A.double()).detach()
    assert float((dense - layer.weight).norm() / dense.norm()) > 0.3  # not a trivial change
    expected = row_norms(dense)
    assert float(((found - expected) / expected).abs().max()) <= limit


def test_bf16_keeps_the_digits_of_a_small_deviation() -> None:
    """1 + 1e-3 rounds to 1 in bf16; the deviation itself does not."""
    _, adapter = attached(nn.Linear(IN, OUT, dtype=torch.bfloat16), size=0.0)
    with torch.no_grad():
        adapter.magnitude.mul_(1 + 1e-3)
    d = adapter.deviation(adapter.base_norm, torch.zeros(OUT))
    torch.testing.assert_close(d.detach(), torch.full((OUT,), 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_zeros_start_unchanged_and_learn(bias: bool) -> None:
    layer = nn.Linear(IN, OUT, bias=bias)
    layer.weight.data[:3] = 0
    x, before = torch.randn(5, IN), deepcopy(layer)
    model, adapter = attached(layer, size=0.0)
    assert torch.equal(model(x), before(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(4):
        model(x).sub(1).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in adapter.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        assert model(x).isfinite().all()
    assert adapter.magnitude[:3].ne(0).all()  # m/‖ΔW‖ has a direction from the first step on
    assert row_norms(adapter.fold(before.weight.detach()))[:3].gt(0).all()


def test_a_row_that_training_made_zero_is_finite() -> None:
    model, adapter = attached(nn.Linear(IN, OUT), size=0.0)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([1.0] + [0.0] * (IN - 1))
        adapter.base_norm[0] = 1.0
        adapter.lora_A.zero_()[0, 0] = 1.0
        adapter.lora_B.zero_()[0, 0] = -1 / adapter.scale
    y = model(torch.randn(5, IN))
    y.sum().backward()
    torch.testing.assert_close(y[:, 0], model[0].bias[0].expand(5))
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


def test_dropout_acts_on_the_input_of_the_low_rank_term_alone() -> None:
    model, adapter = attached(nn.Linear(IN, OUT), dropout=0.5)
    x = torch.randn(7, IN)
    lora = rw.attach(nn.Sequential(nn.Linear(IN, OUT)), rw.LoRA(rank=RANK, dropout=0.5))
    lora[0].weight, lora[0].bias = model[0].weight, model[0].bias
    Adapted.of(lora).adapter_layers("default")["0"].load_state_dict(
        {k: v for k, v in adapter.state_dict().items() if k.startswith("lora_")}
    )
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    v = lora(x)  # W x + b + ΔW·dropout(x) with the same mask
    d = adapter.deviation(*adapter.norm(model[0]))
    torch.testing.assert_close(y, v + d * (v - model[0].bias))
    assert not torch.allclose(model.eval()(x), y)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in storages:
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_makes_nothing_of_the_weights_size(dtype: torch.dtype, dropout: float) -> None:
    model, _ = attached(nn.Linear(256, 256, dtype=dtype), dropout=dropout)
    x = torch.randn(8, 256, dtype=dtype)
    with Largest() as seen:
        model(x).sum().backward()
    assert seen.size <= 8 * 256


def test_under_autocast_the_norm_stays_in_fp32() -> None:
    layer = nn.Linear(IN, OUT)
    model, adapter = attached(layer)
    exact = adapter.norm(layer)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter.norm(layer)[0], exact)
        assert model(torch.randn(3, IN)).dtype == torch.bfloat16


def test_on_a_quantised_base() -> None:
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(IN, OUT).state_dict())
    layer = layer.to("cpu")
    x = torch.randn(5, IN)
    before = layer(x)
    model, adapter = attached(layer, size=0.0)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    dense = nn.Linear(IN, OUT)
    dense.weight.data, dense.bias.data = adapter.fold(adapter.kind.weight(layer).float()), layer.bias.data
    torch.testing.assert_close(model(x), dense(x), rtol=1e-2, atol=1e-2)


def test_several_active_adapters_are_refused() -> None:
    model, _ = attached(nn.Linear(IN, OUT))
    rw.attach(model, rw.LoRA(rank=2, target_modules=["0"]), name="second")
    with pytest.raises(AttachError, match="DoraLayer"):
        rw.activate(model, ["default", "second"])
    rw.activate(model, "default")


def test_a_file_and_its_configuration_must_agree(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = attached(nn.Linear(IN, OUT))
    rw.save(model, tmp_path)
    rw.detach(model)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, key = load_file(path), f"base_model.model.0.{MAGNITUDE}"
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(MissingTensor, match=MAGNITUDE):
        rw.load(model, tmp_path)
    save_file(tensors | {key: torch.ones(OUT + 1)}, path)
    with pytest.raises(ShapeMismatch, match=MAGNITUDE):
        rw.load(model, tmp_path)
    save_file(tensors | {f"{key}.weight": tensors.pop(key)}, path)  # the older spelling
    rw.load(model, tmp_path)
    rw.detach(model)
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(UnexpectedTensor, match="use_dora"):
        rw.load(model, tmp_path)


def test_a_bias_that_is_trained_gets_its_own_gradient() -> None:
    """b is not stretched: y = (1 + d) ⊙ W x + b."""
    model, _ = attached(nn.Linear(IN, OUT))
    model[0].bias.requires_grad_()
    model(torch.randn(7, IN)).sum().backward()
    torch.testing.assert_close(model[0].bias.grad, torch.full((OUT,), 7.0))
