"""LoRA-Pro: the equivalent gradient against its definition, X against a numerical minimiser, AdamW as the oracle."""

import copy
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import CheckpointError, SpecError, TrainingError
from rankwise.methods import resolve
from rankwise.optim import OPTIMIZERS, LoraPro, OptimizerChoice
from rankwise.optim.elementwise import adam_direction
from rankwise.optim.lora_pro import FORMS, equivalent_gradient, equivalent_gradients

S = 1.7


def factor(n: int, r: int, condition: float, rng: torch.Generator) -> Tensor:
    """A random [n, r] matrix in fp64 with singular values from 1 down to 1/condition."""
    u = torch.linalg.qr(torch.randn(n, r, generator=rng, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(r, r, generator=rng, dtype=torch.float64)).Q
    return u * torch.logspace(0, -float(np.log10(condition)), r, dtype=torch.float64) @ v


def problem(
    out: int = 12, into: int = 9, r: int = 4, condition: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    G = torch.randn(out, into, generator=rng, dtype=torch.float64)
    return G, factor(into, r, condition, rng).T.contiguous(), factor(out, r, condition, rng)


def gradients(G: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return S * B.T @ G, S * G @ A.T


def projected(G: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """P_B G + (I − P_B) G P_A, with torch's pseudo-inverses."""
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P_B @ G + (torch.eye(len(G), dtype=G.dtype) - P_B) @ G @ P_A


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


# --- the equivalent gradient -----------------------------------------------------------------------------------------


@given(
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8)).filter(lambda s: s[2] <= min(s[:2])),
    condition=st.sampled_from([1.0, 1e2, 1e4, 1e6]),
    magnitude=st.sampled_from([1e-6, 1.0, 1e5]),
    seed=st.integers(0, 9999),
)
def test_equivalent_gradient_is_the_projection(
    sizes: tuple[int, int, int], condition: float, magnitude: float, seed: int
) -> None:
    G, A, B = problem(*sizes, condition=condition, seed=seed)
    B = magnitude * B
    assert distance(equivalent_gradient(A, B, *gradients(G, A, B), S).dense(), projected(G, A, B)) < 1e-5


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_equivalent_gradient_in_single_precision(condition: float) -> None:
    """All in fp32, the given gradients too: their rounding is amplified by the condition, not by its square."""
    G, A, B = problem(48, 64, 8, condition=condition)
    A, B = A.float(), B.float()
    got = equivalent_gradient(A, B, *gradients(G.float(), A, B), S).dense()
    assert distance(got, projected(G, A.double(), B.double())) < 1e-5


@pytest.mark.parametrize("zero", ["A", "B", "both", "one column of B", "one row of A"])
def test_pseudo_inverse_where_a_half_has_lost_rank(zero: str) -> None:
    G, A, B = problem()
    A = A * (zero not in ("A", "both"))
    B = B * (zero not in ("B", "both"))
    if zero == "one column of B":
        B[:, 2] = 0
    if zero == "one row of A":
        A[1] = 0
    g_A, g_B = equivalent_gradients(A, B, *gradients(G, A, B), S)
    torch.testing.assert_close(S * (B @ g_A + g_B @ A), projected(G, A, B))
    if zero in ("B", "both"):
        assert not g_A.any()
    if zero in ("A", "both"):
        assert not g_B.any()


@given(seed=st.integers(0, 9999), condition=st.sampled_from([1.0, 30.0]))
def test_no_other_pair_step_comes_closer_to_the_gradient(seed: int, condition: float) -> None:
    """g̃ is the least-squares solution over all (dA, dB): solved densely here."""
    G, A, B = problem(6, 5, 2, condition, seed)
    out, into = G.shape
    eye = torch.eye
    # vec of s(B dA + dB A), row-major: kron(B, I) vec(dA) + kron(I, Aᵀ) vec(dB)
    M = S * torch.cat(
        [torch.kron(B, eye(into, dtype=G.dtype)), torch.kron(eye(out, dtype=G.dtype), A.T.contiguous())], dim=1
    )
    best = (M @ torch.linalg.pinv(M) @ G.flatten()).view(out, into)
    torch.testing.assert_close(equivalent_gradient(A, B, *gradients(G, A, B), S).dense(), best)


@settings(max_examples=10)
@given(seed=st.integers(0, 9999), condition=st.sampled_from([1.0, 10.0]))
def test_sylvester_solution_is_the_minimiser(seed: int, condition: float) -> None:
    """Over X, ‖g^A(X) − g_A‖² + ‖g^B(X) − g_B‖², with the formulas written out and scipy as the optimiser."""
    G, A, B = problem(condition=condition, seed=seed)
    grad_A, grad_B = gradients(G, A, B)
    base_A = torch.linalg.inv(B.T @ B) @ grad_A / S**2
    outside = torch.eye(len(B), dtype=B.dtype) - B @ torch.linalg.inv(B.T @ B) @ B.T
    base_B = outside @ grad_B @ torch.linalg.inv(A @ A.T) / S**2

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        X = torch.tensor(x.reshape(4, 4), requires_grad=True)
        value = (base_A + X @ A - grad_A).square().sum() + (base_B - B @ X - grad_B).square().sum()
        (slope,) = torch.autograd.grad(value, X)
        return value.item(), slope.numpy().ravel()

    found = minimize(objective, np.zeros(16), jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-12})
    X = torch.tensor(found.x.reshape(4, 4))
    g_A, g_B = equivalent_gradients(A, B, grad_A, grad_B, S)
    size = float(base_A.norm() + base_B.norm())
    assert float((g_A - base_A - X @ A).norm()) < 1e-4 * size
    assert float((g_B - base_B + B @ X).norm()) < 1e-4 * size
    ours = float((g_A - grad_A).square().sum() + (g_B - grad_B).square().sum())
    assert ours <= found.fun * (1 + 1e-9)


def test_a_batch_of_pairs_is_the_pairs_one_by_one() -> None:
    problems = [problem(condition=c, seed=i) for i, c in enumerate((1.0, 10.0, 100.0))]
    problems[1][2].zero_()
    args = [(A, B, *gradients(G, A, B)) for G, A, B in problems]
    together = equivalent_gradients(*(torch.stack(t) for t in zip(*args, strict=True)), S)
    for i, one in enumerate(args):
        for got, expected in zip((t[i] for t in together), equivalent_gradients(*one, S), strict=True):
            torch.testing.assert_close(got, expected)


# --- the steps -------------------------------------------------------------------------------------------------------


def test_adam_direction_is_torchs() -> None:
    parameter = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    oracle = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0, betas=(0.8, 0.95), eps=1e-3)
    state: dict[str, Any] = {}
    for _ in range(7):
        gradient = torch.randn(5, 3, dtype=torch.float64)
        before = parameter.detach().clone()
        parameter.grad = gradient
        oracle.step()
        torch.testing.assert_close(before - adam_direction(gradient, state, (0.8, 0.95), 1e-3), parameter.detach())


def square_pair(out: int, into: int) -> tuple[nn.Module, nn.Linear]:
    """A model whose only layer has a pair of rank min(out, in), neither half zero; and the plain layer."""
    plain = nn.Linear(into, out, bias=False, dtype=torch.float64)
    model = nn.Sequential(copy.deepcopy(plain))
    rw.attach(model, rw.LoRA(rank=min(out, into), alpha=8, target_modules=("0",)))
    (pair,) = rw.pairs(model)
    with torch.no_grad():
        for parameter in pair.parameters:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64)
        start = copy.deepcopy(plain)
        start.weight += pair.layer.delta().dense()
    return model, start


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    rng = torch.Generator().manual_seed(3)
    into = next(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    for _ in range(steps):
        x = torch.randn(20, into, generator=rng, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("out", "into"), [(3, 5), (5, 3), (4, 4)])
def test_with_full_rank_the_weight_moves_as_in_full_fine_tuning(form: str, out: int, into: int) -> None:
    """For r = min(out, in) the projection is the identity: P_B = I or P_A = I, so g̃ = G and N is left as it is.

    The pair's step moves the weight by −lr·N + lr² s g^B g^A, N being full fine-tuning's direction. So after any
    fixed number of steps the two weights differ by a term of order lr²: half the rate, a quarter of the difference.
    """
    oracle = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[form]
    model, plain = square_pair(out, into)
    differences, moves = [], []
    for lr in (1e-5, 5e-6):
        adapted, full = copy.deepcopy(model), copy.deepcopy(plain)
        (pair,) = rw.pairs(adapted)
        train(adapted, LoraPro([pair], lr=lr, form=form), steps=5)
        train(full, oracle(full.parameters(), lr=lr, weight_decay=0.0), steps=5)
        weight = adapted[0].weight + pair.layer.delta().dense()
        differences.append(float((weight - full.weight).detach().norm()))
        moves.append(float((full.weight - plain.weight).detach().norm()))
    assert differences[0] < 1e-2 * moves[0]
    assert differences[0] / differences[1] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_is_exactly_first_order_plus_the_product_of_the_directions(form: str) -> None:
    model, plain = square_pair(4, 6)
    (pair,) = rw.pairs(model)
    before = [p.detach().clone() for p in pair.parameters]
    train(model, LoraPro([pair], lr=1e-2, form=form), steps=1)
    train(
        plain,
        {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[form](plain.parameters(), lr=1e-2, weight_decay=0.0),
        1,
    )
    moved_A, moved_B = (p.detach() - old for p, old in zip(pair.parameters, before, strict=True))
    weight = model[0].weight + pair.layer.delta().dense()
    torch.testing.assert_close(weight.detach(), plain.weight.detach() + pair.scale * moved_B @ moved_A)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.first = nn.Linear(6, 10)
        self.twin = nn.Linear(6, 10)
        self.last = nn.Linear(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(self.last((self.first(h) * self.twin(h)).tanh())).mean(1)


IDS = torch.arange(24).view(6, 4) % 20


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) - 1.0).square().mean()


def adapted(init: str = "kaiming", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    spec = rw.LoRA(rank=2, init=init, target_modules=("first", "twin", "last"), **options)
    return rw.attach(Net(), spec, batches=[IDS], loss=loss_of)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, IDS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", ["kaiming", "init-b", "pissa", "lora-ga"])
def test_a_step_moves_the_weight_along_the_projected_gradient(form: str, init: str) -> None:
    """Through attach, anchored or not: what delta() does after one tiny step."""
    model, lr = adapted(init).double(), 1e-6
    layers = {pair.name: model.get_submodule(pair.name) for pair in rw.pairs(model)}
    exact = {name: g.matrix for name, g in rw.gradients(model, [IDS], list(layers), loss=loss_of).items()}
    before = {pair.name: (pair.A.detach().clone(), pair.B.detach().clone()) for pair in rw.pairs(model)}
    start = {pair.name: pair.layer.delta().dense().detach() for pair in rw.pairs(model)}
    run(model, LoraPro(rw.pairs(model), lr=lr, form=form, eps=1e-12), 1)
    for pair in rw.pairs(model):
        target = projected(exact[pair.name].double(), *before[pair.name])
        if form == "adamw":  # Adam's first direction is the sign
            target = projected(target / (target.abs() + 1e-12), *before[pair.name])
        moved = (pair.layer.delta().dense().detach() - start[pair.name]) / -lr
        assert distance(moved, target) < 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", ["kaiming", "init-b", "pissa", "lora-ga"])
def test_training_lowers_the_loss(form: str, init: str) -> None:
    model = adapted(init)
    losses = run(model, LoraPro(rw.pairs(model), lr={"sgd": 0.1, "adamw": 3e-3}[form], form=form), 30)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_resumes_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    def fresh() -> tuple[nn.Module, LoraPro]:
        model = adapted("pissa").to(dtype)
        model.head.requires_grad_(True)
        return model, LoraPro.for_model(model, lr=1e-2, form=form, weight_decay=0.1)

    model, optimizer = fresh()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    run(model, optimizer, 3)
    schedule.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, 4)

    resumed, second = fresh()
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert second.param_groups[0]["lr"] == pytest.approx(9e-3)
    run(resumed, second, 4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for one, other in itertools.zip_longest(optimizer.state.values(), second.state.values()):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


def test_a_state_of_other_pairs_or_another_form_is_refused() -> None:
    model = adapted()
    state = LoraPro(rw.pairs(model), lr=1e-3).state_dict()
    with pytest.raises(CheckpointError, match="expected the pairs"):
        LoraPro(rw.pairs(model)[:2], lr=1e-3).load_state_dict(state)
    with pytest.raises(CheckpointError, match="expected the method LoraPro, sgd_pairs, found LoraPro, adamw_pairs"):
        LoraPro(rw.pairs(model), lr=1e-3, form="sgd").load_state_dict(state)


def test_closure_and_scheduler() -> None:
    model = adapted()
    optimizer = LoraPro(rw.pairs(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, IDS)
        loss.backward()
        return loss

    before = loss_of(model, IDS).item()
    assert optimizer.step(closure).item() == before
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3
    assert loss_of(model, IDS).item() < before


@pytest.mark.parametrize("form", FORMS)
def test_others_are_stepped_as_torch_would(form: str) -> None:
    model, twin = adapted(), adapted()
    for net in (model, twin):
        net.head.requires_grad_(True)
    oracle = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[form]
    pro = LoraPro.for_model(model, lr=1e-2, form=form)
    assert {id(p) for g in pro.param_groups for p in g["params"]} == {id(p) for p in rw.trainable_parameters(model)}
    run(model, pro, 1)
    run(twin, oracle(twin.head.parameters(), lr=1e-2, weight_decay=0.0), 1)
    torch.testing.assert_close(model.head.weight, twin.head.weight)
    torch.testing.assert_close(model.head.bias, twin.head.bias)


def test_others_may_bring_their_own_rate() -> None:
    model = adapted()
    model.head.requires_grad_(True)
    before = model.head.weight.detach().clone()
    optimizer = LoraPro(
        rw.pairs(model), lr=1e-2, form="sgd", others=[{"params": model.head.parameters(), "lr": 0.5, "name": "head"}]
    )
    run(model, optimizer, 1)
    assert [group["name"] for group in optimizer.param_groups] == ["pairs", "head"]
    torch.testing.assert_close(model.head.weight.detach(), before - 0.5 * model.head.weight.grad)


def test_weight_decay_pulls_towards_the_pretrained_model() -> None:
    model = adapted("pissa")
    run(model, LoraPro(rw.pairs(model), lr=1e-2), 3)
    (pair, *_) = rw.pairs(model)
    before = float(pair.layer.delta().norm().detach())
    for p in rw.trainable_parameters(model):
        p.grad = torch.zeros_like(p)
    LoraPro(rw.pairs(model), lr=0.5, form="sgd", weight_decay=0.5).step()
    assert 0 < float(pair.layer.delta().norm().detach()) < before


def test_a_pair_without_gradients_is_left_alone_and_half_a_gradient_is_an_error() -> None:
    model = adapted("pissa")
    first, second, _ = rw.pairs(model)
    loss_of(model, IDS).backward()
    for parameter in first.parameters:
        parameter.grad = None
    optimizer = LoraPro(rw.pairs(model), lr=1e-2)
    optimizer.step()
    assert not any(p.any() for p in first.parameters)
    assert all(p.any() for p in second.parameters)
    second.parameters[0].grad = None
    with pytest.raises(TrainingError, match="twin: one half"):
        optimizer.step()


def test_not_a_number_is_named_and_moves_nothing_there() -> None:
    model = adapted()
    loss_of(model, IDS).backward()
    _, twin, _ = rw.pairs(model)
    twin.parameters[1].grad[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="twin: its gradient"):
        LoraPro(rw.pairs(model), lr=1e-2).step()
    assert all(p.isfinite().all() for p in rw.trainable_parameters(model))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"form": "adam"}, "did you mean 'adamw'"),
        ({"lr": 0.0}, "lr"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        LoraPro(rw.pairs(adapted()), **{"lr": 1e-3, **options})


def test_what_would_never_be_stepped_is_refused() -> None:
    model = adapted()
    with pytest.raises(SpecError, match="found none"):
        LoraPro([], lr=1e-3)
    with pytest.raises(SpecError, match="given twice"):
        LoraPro([*rw.pairs(model), rw.pairs(model)[0]], lr=1e-3)
    layer = Adapted.of(model).slots["last"].adapters["default"]
    layer.magnitude = nn.Parameter(torch.ones(4))
    with pytest.raises(SpecError, match="last: its trainable 'magnitude'"):
        LoraPro(rw.pairs(model), lr=1e-3)
    LoraPro(rw.pairs(model), lr=1e-3, others=[layer.magnitude])
    rw.pairs(model)[0].parameters[0].requires_grad_(False)
    with pytest.raises(SpecError, match="first: expected both halves"):
        LoraPro.for_model(model, lr=1e-3)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_table_trains_everything(name: str) -> None:
    model = adapted()
    model.head.requires_grad_(True)
    choice = resolve(OPTIMIZERS, name, "optimizer")
    assert isinstance(choice, OptimizerChoice)
    optimizer = choice(model, lr=1e-3, weight_decay=0.01)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in rw.trainable_parameters(model))
    assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups)
    losses = run(model, optimizer, 10)
    assert losses[-1] < losses[0]


def test_a_change_that_is_no_product_of_the_pair_is_refused() -> None:
    model = rw.attach(nn.Sequential(nn.Linear(16, 16)), rw.LoRA(rank=2, variant="adalora"))
    with pytest.raises(SpecError, match=r"0: .* expected the variant 'lora' or 'dora', found AdaLoraLayer"):
        LoraPro.for_model(model, lr=1e-3)
