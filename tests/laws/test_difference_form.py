"""Law 1: a non-zero start is cancelled by computing in differences, not by subtracting two large products."""

import pytest
import torch
from torch import Tensor, nn
from zoo import perturb

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.inits import INITS

SIZE, TOKENS = 1024, 64


@pytest.fixture(scope="module")
def layer_and_batch() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).to(torch.bfloat16)
    return model, torch.randn(TOKENS, SIZE, dtype=torch.bfloat16)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def _attached(init: str, pretrained: nn.Module, x: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).to(torch.bfloat16)
    model.load_state_dict(pretrained.state_dict())
    spec = rw.LoRA(rank=8, alpha=16, scaling="rslora", init=init, target_modules=["0"])
    weight = model[0].weight.detach().float()
    original = {"0": weight + 1e-3 * torch.randn_like(weight)} if spec.init.needs == "weights" else None
    return rw.attach(model, spec, batches=[x], loss=_loss, evidence=original)


@pytest.mark.parametrize("init", INITS)
def test_bf16_output_of_a_small_change_against_fp64(init: str, layer_and_batch):
    """At |δ| = 1e-4 the adapter's output is right within 1 %, where BA − B₀A₀ in bf16 is off by far more."""
    model, x = _attached(init, *layer_and_batch), layer_and_batch[1]
    adapter = Adapted.of(model).adapter_layers("default")["0"]
    (pair,) = rw.pairs(model)
    A0, B0 = pair.A.detach().double(), pair.B.detach().double()
    perturb(model, 1e-4)
    A, B = pair.A.detach().double(), pair.B.detach().double()
    if adapter.start_A is not None:  # δ itself, not what is left of it in A₀ + δ
        A = adapter.start_A.double() + adapter.lora_A.detach().double()
        B = adapter.start_B.double() + adapter.lora_B.detach().double()
    if not INITS[init].cls.keeps_function:
        A0, B0 = torch.zeros_like(A0), torch.zeros_like(B0)  # nothing is to be cancelled
    true = x.double() @ (pair.scale * (B @ A - B0 @ A0)).T
    with torch.no_grad():
        found = adapter.adapt(model[0], x, torch.zeros(TOKENS, SIZE, dtype=torch.bfloat16))
    error = float((found.double() - true).norm() / true.norm())
    assert error <= 0.01, f"{error:.2%}"

    if adapter.start_A is not None:  # the oracle's other side: the naive form really is that bad
        h, h0 = (x @ M.bfloat16().T for M in (A, A0))
        naive = pair.scale * (h @ B.bfloat16().T - h0 @ B0.bfloat16().T)
        assert float((naive.double() - true).norm() / true.norm()) > 0.02


@pytest.mark.parametrize("init", INITS)
def test_saved_factors_hold_the_difference_not_the_products(init: str, layer_and_batch, tmp_path):
    """What other engines get is exact on the clean base: [A; δA], [δB, B₀], not [A; A₀], [B, −B₀]."""
    from safetensors.torch import load_file

    model = _attached(init, *layer_and_batch)
    perturb(model, 1e-4)
    expected = Adapted.of(model).adapter_layers("default")["0"].double().delta().dense().detach()
    rw.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.0.lora_{half}.weight"].bfloat16().double() for half in "AB")
    scale = Adapted.of(model).adapter_layers("default")["0"].scale
    # An engine that casts the factors to bf16 still has the change within bf16's rounding.
    assert float((scale * B @ A - expected).norm() / expected.norm()) < 0.01
