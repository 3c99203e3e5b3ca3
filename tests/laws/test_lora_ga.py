"""LoRA-GA against closed form: what its start must capture, what its first step must be, what must not change it."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from zoo import relative

import rankwise as rw
from rankwise.evidence import ExactGradient
from rankwise.inits import LoraGA
from rankwise.inits.lora_ga import DIRECTIONS, SCALES
from rankwise.sites import Site, Start

OUT, IN, RANK, ALPHA = 48, 36, 4, 6.0


def gradient(decay: float = 0.85) -> Tensor:
    """With a spectrum that is neither flat nor of low rank."""
    u, _ = torch.linalg.qr(torch.randn(OUT, IN, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64))
    return u * decay ** torch.arange(IN, dtype=torch.float64) @ v.T


def start(G: Tensor, weight: Tensor | None = None, scale_s: float = 1.7, **options):
    site = Site("layer", "linear", (OUT, IN), RANK, scale_s)
    weight = torch.randn(OUT, IN, dtype=torch.float64) if weight is None else weight
    return LoraGA(**options)(weight, site, ExactGradient(G), torch.Generator().manual_seed(1))


def best(G: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(G, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_the_energy_captured_is_the_best_rank_2r_approximations(directions: str):
    G = gradient()
    pair = start(G, directions=directions, scale="unit")
    step = pair.B @ pair.B.T @ G + G @ pair.A.T @ pair.A
    optimum = best(G, 2 * RANK)
    captured = 1 - (G - step).square().sum() / G.square().sum()
    possible = 1 - (G - optimum).square().sum() / G.square().sum()
    assert 0.3 < possible < 0.99  # the comparison says something
    assert abs(float(captured - possible)) < 1e-3 * float(possible)
    assert relative(step, optimum) < 1e-8


def test_the_random_split_is_disjoint_and_not_always_the_same():
    G = gradient()
    u, _, vh = torch.linalg.svd(G, full_matrices=False)
    splits = set()
    for seed in range(8):
        site = Site("layer", "linear", (OUT, IN), RANK, 1.0)
        init = LoraGA(directions="random", scale="unit")
        pair = init(G, site, ExactGradient(G), torch.Generator().manual_seed(seed))
        of_A = (pair.A @ vh.T).abs().argmax(1).tolist()
        of_B = (pair.B.T @ u).abs().argmax(1).tolist()
        assert sorted(of_A + of_B) == list(range(2 * RANK))
        splits.add(tuple(sorted(of_A)))
    assert len(splits) > 1


@pytest.mark.parametrize(
    ("directions", "of_A", "of_B"),
    [
        ("ArB2r", [0, 1, 2, 3], [4, 5, 6, 7]),
        ("A2rBr", [4, 5, 6, 7], [0, 1, 2, 3]),
        ("ArBr", [1, 3, 5, 7], [0, 2, 4, 6]),
    ],
)
def test_the_reference_codes_choice_of_directions(directions: str, of_A: list[int], of_B: list[int]):
    """The literal text of the reference: A = V[indices_A], B = U[:, indices_B], up to signs."""
    G = gradient()
    u, _, vh = torch.linalg.svd(G, full_matrices=False)
    pair = start(G, directions=directions, scale="unit")
    assert relative((pair.A @ vh[of_A].T).abs(), torch.eye(RANK, dtype=torch.float64)) < 1e-6
    assert relative((pair.B.T @ u[:, of_B]).abs(), torch.eye(RANK, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("name", SCALES)
def test_the_scale_of_the_start(name: str, scaling: str):
    """Row norms of A₀ and column norms of B₀ are c, by the formulas of the article and its code."""
    s = ALPHA / RANK if scaling == "lora" else ALPHA / math.sqrt(RANK)
    weight, gamma = torch.randn(OUT, IN, dtype=torch.float64), 9.0
    singular = torch.linalg.svdvals(weight)[:RANK]
    c = {
        "stable": OUT**0.25 / math.sqrt(gamma),
        "gd": 1 / s,
        "unit": 1.0,
        "weight": float((singular / s).sqrt().mean()),
    }[name]
    pair = start(gradient(), weight, s, scale=name, gamma=gamma)
    expected = torch.full((RANK,), c, dtype=torch.float64)
    torch.testing.assert_close(pair.A.norm(dim=1), expected)
    torch.testing.assert_close(pair.B.norm(dim=0), expected)


def _model_and_batches(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 24)).to(dtype)
    return model, [(torch.randn(64, IN, dtype=dtype), torch.randn(64, 24, dtype=dtype)) for _ in range(3)]


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def _full_step(model: nn.Sequential, batches: list) -> dict[str, Tensor]:
    """Plain autograd's mean weight gradients: what full fine-tuning would step along."""
    parameters = {"0": model[0].weight, "2": model[2].weight}
    total = sum(_loss(model, b) for b in batches) / len(batches)
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_first_sgd_step_is_the_projection_of_the_full_one(scale: str, scaling: str, directions: str):
    """ΔW after one SGD step with rate η is −η s²c² × G's rank-2r approximation, but for terms of order η²."""
    model, batches = _model_and_batches()
    full = _full_step(model, batches)
    init = LoraGA(directions=directions, scale=scale)
    rw.attach(model, rw.LoRA(rank=RANK, alpha=ALPHA, init=init, scaling=scaling), batches=batches, loss=_loss)
    c = {pair.name: float(pair.A[0].detach().norm()) for pair in rw.pairs(model)}
    eta = 1e-6
    optimizer = torch.optim.SGD(rw.trainable_parameters(model), lr=eta)
    (sum(_loss(model, b) for b in batches) / len(batches)).backward()
    optimizer.step()
    for pair in rw.pairs(model):
        moved = pair.layer.delta().dense().detach() / -eta
        factor = pair.scale**2 * c[pair.name] ** 2
        assert relative(moved, factor * best(full[pair.name], 2 * RANK)) < 1e-3, pair.name
        if scale == "gd":
            assert factor == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scaling_the_loss_changes_the_start_by_nothing_but_rounding(factor: float):
    model, batches = _model_and_batches(torch.float32)
    starts = []
    for multiple in (1.0, factor):
        rw.attach(
            model,
            rw.LoRA(rank=RANK, init="lora-ga"),
            batches=batches,
            loss=lambda m, b, multiple=multiple: multiple * _loss(m, b),
        )
        starts.append({p.name: (p.A.detach().clone(), p.B.detach().clone()) for p in rw.pairs(model)})
        rw.detach(model)
    for name, (A, B) in starts[0].items():
        other_A, other_B = starts[1][name]
        # Row by row: a singular vector may come with the other sign.
        for x, y in ((A, other_A), (B.T, other_B.T)):
            cosines = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
            assert relative(y.norm(dim=1), x.norm(dim=1)) < 1e-5
            assert bool((cosines.abs() > 1 - 1e-5).all()), (name, cosines)


def literal_article(G: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """The article's Algorithm 1 as printed, for y = x W with W [in, out]: A [in, r], B [r, out]."""
    grad = G.T  # [in, out]
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    d_out = grad.shape[1]
    A = u[:, :rank] * d_out**0.25 / gamma**0.5
    B = vh[rank : 2 * rank] * d_out**0.25 / gamma**0.5
    return A, B


def test_the_whole_method_against_a_literal_transcription():
    """Through attach: gradients, SVD, split, scale; the start's products in the article's own layout."""
    model, batches = _model_and_batches()
    full = _full_step(model, batches)
    rw.attach(model, rw.LoRA(rank=RANK, init="lora-ga", scaling="rslora"), batches=batches, loss=_loss)
    for pair in rw.pairs(model):
        A, B = literal_article(full[pair.name], RANK, 16.0)
        # Signs of singular vectors are free, so compare what does not depend on them: their projectors.
        assert relative(pair.A.T @ pair.A, A @ A.T) < 1e-6
        assert relative(pair.B @ pair.B.T, B.T @ B) < 1e-6
        assert pair.A.shape == A.T.shape


def test_evidence_and_batches_give_the_same_start():
    model, batches = _model_and_batches()
    spec = rw.LoRA(rank=RANK, init="lora-ga")
    seen = rw.gradients(model, batches, loss=_loss)
    rw.attach(model, spec, evidence=seen)
    first = [(p.A.detach().clone(), p.B.detach().clone()) for p in rw.pairs(model)]
    rw.detach(model)
    rw.attach(model, spec, batches=iter(batches), loss=_loss)
    for (A, B), pair in zip(first, rw.pairs(model), strict=True):
        assert torch.equal(A, pair.A) and torch.equal(B, pair.B)


def test_a_second_adapters_start_comes_from_the_pretrained_model():
    """Evidence for a new adapter is collected with the others switched off."""
    model, batches = _model_and_batches()
    rw.attach(model, rw.LoRA(rank=RANK, init="lora-ga"), batches=batches, loss=_loss, name="alone")
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    rw.attach(model, rw.LoRA(rank=RANK, init="lora-ga"), batches=batches, loss=_loss, name="second")
    first, second = rw.pairs(model, "alone"), rw.pairs(model, "second")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.layer.start_A, b.layer.start_A)


def test_layers_of_one_shape_may_be_aligned_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator does, on the CPU: the starts are those of one layer after the other."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (12, 16), "b": (12, 16), "c": (16, 12), "d": (12, 16)}
    evidence = {name: ExactGradient(torch.randn(*shape, generator=generator)) for name, shape in shapes.items()}
    sites = [Site(name, "linear", shape, 3, 0.5) for name, shape in shapes.items()]
    init = LoraGA(align="adam")

    def starts() -> dict[str, Start]:
        generators = {name: torch.Generator().manual_seed(1) for name in shapes}
        found = init.starts(sites, lambda site: torch.zeros(site.shape), evidence, generators)
        return {site.name: start for site, start in found}

    alone = starts()
    groups: list[list[str]] = []

    def alike(sites: list[Site], evidence: object) -> Iterator[list[Site]]:
        for shape in dict.fromkeys(shapes.values()):
            group = [site for site in sites if site.shape == shape]
            groups.append([site.name for site in group])
            yield group

    monkeypatch.setattr("rankwise.inits.lora_ga._alike", alike)
    together = starts()
    assert groups == [["a", "b", "d"], ["c"]]
    for name, start in alone.items():
        torch.testing.assert_close(together[name].A, start.A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(together[name].B, start.B, rtol=1e-3, atol=1e-4)
        assert together[name].notes == pytest.approx(start.notes, rel=1e-4)
