"""y += s · dropout(x) Aᵀ Bᵀ: values and gradients against plain autograd, and what is kept for the backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import TOLERANCE, relative

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.layers.low_rank_product import _mask, add_low_rank


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, seed: int) -> Tensor:
    """The definition, differentiated by autograd, in fp64. The mask is written out."""
    dtype = y.dtype
    y, x, A, B = (t.double() for t in (y, x, A, B))
    if dropout:
        kept = _mask(torch.empty(x.shape, dtype=dtype), dropout, seed)
        x = x * kept.double() / (1 - dropout)
    return y + scale * (x @ A.T) @ B.T


def seed_of_next_call() -> int:
    """What the function will draw from the global generator, which is put back."""
    state = torch.get_rng_state()
    seed = int(torch.randint(2**31 - 1, ()))
    torch.set_rng_state(state)
    return seed


@given(
    batch=st.sampled_from([(), (1,), (5,), (2, 3), (2, 0), (2, 2, 2)]),
    out=st.integers(1, 7),
    into=st.integers(1, 7),
    rank=st.integers(1, 4),
    dtypes=st.sampled_from(
        [  # of y, of x, of A and B
            (torch.float64, torch.float64, torch.float64),
            (torch.float32, torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.float32, torch.float32),
            (torch.float32, torch.bfloat16, torch.float32),
        ]
    ),
    dropout=st.sampled_from([0.0, 0.5]),
    wanted=st.tuples(*[st.booleans()] * 4),
    contiguous=st.booleans(),
)
def test_values_and_gradients_equal_plain_autograd(batch, out, into, rank, dtypes, dropout, wanted, contiguous):
    of_y, of_x, of_factors = dtypes
    base = torch.randn(*batch, out).to(of_y)
    x = torch.randn(*batch, into).to(of_x)
    A, B = torch.randn(rank, into).to(of_factors), torch.randn(out, rank).to(of_factors)
    leaves = [t.requires_grad_(w) for t, w in zip((base, x, A, B), wanted, strict=True)]
    y = base * 1 if contiguous or len(batch) < 2 else (base.transpose(0, 1) * 1).transpose(0, 1)
    seed = seed_of_next_call()
    found = add_low_rank(y, x, A, B, 1.5, dropout)
    expected = plain(base, x, A, B, 1.5, dropout, seed)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[
        torch.bfloat16 if torch.bfloat16 in dtypes else of_y
    ]
    size = 1 + float(
        base.detach().double().norm() + x.detach().double().norm() * (A.norm() * B.norm()).detach().double()
    )
    assert found.dtype == of_y and found.shape == expected.shape
    assert float((found.detach().double() - expected.detach()).norm()) <= tolerance * size
    if not any(wanted):
        assert not found.requires_grad
        return
    grad = torch.randn_like(found)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    mine = torch.autograd.grad(found, trained, grad)
    oracle = torch.autograd.grad(expected, trained, grad.double())
    for leaf, g, o in zip(trained, mine, oracle, strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        bound = (1 + float(grad.double().norm())) * size * (1 + float(A.detach().norm() + B.detach().norm()))
        assert float((g.double() - o.double()).norm()) <= tolerance * bound


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout: float):
    """Finite differences: an oracle that shares nothing with the formulas."""
    y, x = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    A = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    B = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return add_low_rank(y.clone(), x, A, B, 0.7, dropout)

    assert torch.autograd.gradcheck(function, (x, A, B))


def test_dropout_drops_the_stated_share_and_keeps_the_mean():
    x, A, B = torch.ones(1, 100_000), torch.eye(1, 100_000), torch.ones(1, 1)
    shares = [float(add_low_rank(torch.zeros(1, 1), x, A, B, 1.0, 0.25)) for _ in range(200)]
    assert {round(share, 6) for share in shares} == {0.0, round(1 / 0.75, 6)}
    kept = _mask(torch.empty(100_000), 0.25, 7)
    assert abs(float(kept.mean()) - 0.75) < 0.01
    assert not torch.equal(kept, _mask(torch.empty(100_000), 0.25, 8))


def test_the_output_is_written_into_the_layers_own():
    y, x = torch.zeros(3, 4), torch.randn(3, 5)
    A, B = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    assert add_low_rank(y, x, A, B, 1.0).data_ptr() == y.data_ptr()
    with torch.no_grad():
        assert add_low_rank(y, x, A, B, 1.0) is y


def test_modes_without_gradients():
    x, A, B = torch.randn(3, 5), torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    expected = 2.0 * x @ A.T @ B.T
    with torch.no_grad():
        torch.testing.assert_close(add_low_rank(torch.zeros(3, 4), x, A, B, 2.0), expected.detach())
    with torch.inference_mode():
        torch.testing.assert_close(add_low_rank(torch.zeros(3, 4), x, A, B, 2.0), expected.detach())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradgradcheck(dropout: float):
    y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    A = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    B = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def function(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return add_low_rank(y.clone(), x, A, B, 0.7, dropout).sin()

    assert torch.autograd.gradgradcheck(function, (y, x, A, B))


class Attention(nn.Module):
    """q, k and v share an input."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def saved(model: nn.Module, x: Tensor) -> dict[int, tuple[int, ...]]:
    """Storage → shape of each tensor kept for the backward pass of q, k and v alone."""
    kept: dict[int, tuple[int, ...]] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = tuple(t.shape)
        alive.append(t)
        return t

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (model.q(x) + model.k(x) + model.v(x)).sum()
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_x_once_and_xA_are_kept(dropout: float):
    model, x = Attention(), torch.randn(4, 50, 16)
    rw.attach(model, rw.LoRA(rank=3, target_modules=["q", "k", "v"], dropout=dropout))
    kept = saved(model, x)
    assert kept.pop(x.untyped_storage().data_ptr()) == (4, 50, 16)
    factors = {p.untyped_storage().data_ptr() for p in rw.trainable_parameters(model)}
    activations = [shape for storage, shape in kept.items() if storage not in factors]
    assert activations == [(200, 3)] * 3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_with_an_anchor_2r_columns_and_the_stacked_factors_are_kept(dropout: float):
    model, x = Attention(), torch.randn(4, 50, 16)
    rw.attach(model, rw.LoRA(rank=3, init="pissa", target_modules=["q", "k", "v"], dropout=dropout))
    kept = saved(model, x)
    assert kept.pop(x.untyped_storage().data_ptr()) == (4, 50, 16)
    assert sorted(kept.values()) == sorted([(200, 6), (6, 16), (16, 6)] * 3)


def test_in_bf16_nothing_is_kept_in_fp32():
    model, x = Attention().bfloat16(), torch.randn(4, 50, 16, dtype=torch.bfloat16)
    rw.attach(model, rw.LoRA(rank=3, target_modules=["q", "k", "v"]))
    bytes_kept = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal bytes_kept
        if not isinstance(t, nn.Parameter) and t.data_ptr() != x.data_ptr():
            bytes_kept += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.q(x).sum()
    assert bytes_kept == 200 * 3 * 2


def _grads(model: nn.Module, x: Tensor, forward=None) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(11)
    (forward or model)(x).square().mean().backward()
    return [p.grad.clone() for p in rw.trainable_parameters(model)]


def _trained(dropout: float, **spec) -> tuple[nn.Module, Tensor]:
    model, x = Attention(), torch.randn(2, 5, 16, requires_grad=True)
    rw.attach(model, rw.LoRA(rank=3, dropout=dropout, **spec))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, x


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing_gives_the_same_gradients(dropout: float, reentrant: bool, init: str):
    """With dropout too: the second forward draws the same mask."""
    model, x = _trained(dropout, init=init)
    expected = _grads(model, x)
    found = _grads(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for a, b in zip(found, expected, strict=True):
        assert b.any()
        assert relative(a, b) < 1e-6


def test_the_same_mask_serves_both_halves():
    """A start cancels under dropout too: at the start the output is the base's exactly, whatever is dropped."""
    layer = nn.Linear(16, 16)
    model = nn.Sequential(copy.deepcopy(layer))
    rw.attach(model, rw.LoRA(rank=3, init="pissa", dropout=0.5))
    model.train()
    x = torch.randn(9, 16)
    assert torch.equal(model(x), layer(x))
    perturbed = Adapted.of(model).adapter_layers("default")["0"]
    with torch.no_grad():
        perturbed.lora_A.normal_(std=0.1)
        perturbed.lora_B.normal_(std=0.1)
    seed = seed_of_next_call()
    dropped = x * _mask(torch.empty(9, 16), 0.5, seed) / 0.5
    dense = perturbed.scale * (perturbed.B @ perturbed.A - perturbed.start_B @ perturbed.start_A)
    torch.testing.assert_close(model(x), layer(x) + dropped @ dense.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_autocast(init: str):
    model, x = _trained(0.0, init=init)
    reference = copy.deepcopy(model).double()
    expected = _grads(reference, x.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
    assert relative(y, reference(x.detach().double())) < 3 * TOLERANCE[torch.bfloat16]
    model.zero_grad()
    y.float().square().mean().backward()
    for p, e in zip(rw.trainable_parameters(model), expected, strict=True):
        assert p.grad.dtype == torch.float32
        assert relative(p.grad, e) < 0.05


class KeepsFp32(nn.Linear):
    """A layer that leaves autocast, as normalisations and routers do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def test_autocast_around_a_layer_that_leaves_it():
    model, x = nn.Sequential(KeepsFp32(6, 6)), torch.randn(4, 6)
    rw.attach(model, rw.LoRA(rank=2))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.normal_()
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.float32
        y.square().mean().backward()
    assert relative(y, expected) < TOLERANCE[torch.bfloat16]
    assert all(p.grad.any() for p in rw.trainable_parameters(model))
