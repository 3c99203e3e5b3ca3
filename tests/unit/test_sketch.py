"""Sketched gradients: against the exact ones, at a fraction of their storage."""

import logging

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.evidence.sketch import SketchedGradient
from rankwise.layers.kinds import CONV2D, LINEAR


def decaying(tokens: int, out: int, into: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and output gradients whose products have a decaying spectrum, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, min(out, into) + 1) ** -0.7
    left = torch.linalg.qr(torch.randn(out, len(fall), generator=torch.Generator().manual_seed(7))).Q
    right = torch.linalg.qr(torch.randn(into, len(fall), generator=torch.Generator().manual_seed(8))).Q
    shared = torch.randn(tokens, len(fall), generator=generator) * fall.sqrt()
    noise = torch.randn(tokens, len(fall), generator=generator) * fall.sqrt()
    return (shared @ right.T), ((shared + 0.5 * noise) @ left.T)


class Bilinear(nn.Module):
    """loss = Σ Y ⊙ dY, so the layer's output gradient is the batch's dY."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.layer = nn.Linear(into, out, bias=False)

    def forward(self, x: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * grad_y).sum()


def collect(batches: list[tuple[torch.Tensor, torch.Tensor]], **options: object) -> SketchedGradient:
    """Here ``rank`` is the number of directions that are kept."""
    out, into = batches[0][1].shape[1], batches[0][0].shape[1]
    options.setdefault("oversample", 1)
    found = rw.gradients(Bilinear(out, into), batches, ["layer"], "sketch", loss=lambda m, batch: m(*batch), **options)
    return found["layer"]


def share_of_optimum(sketch: SketchedGradient, G: torch.Tensor, k: int) -> float:
    u, _, v = (half.double() for half in sketch.svd(k))
    kept = (u.T @ G.double() @ v).square().sum()
    return float(kept / torch.linalg.svdvals(G.double())[:k].square().sum())


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_a_running_factor_keeps_nearly_all_that_the_best_one_would(shape: tuple[int, int]) -> None:
    batches = [decaying(200, *shape, seed) for seed in range(8)]
    G = sum(dy.T @ x for x, dy in batches) / 8
    one, two = collect(batches, rank=16), collect(batches, rank=16, passes=2)
    assert share_of_optimum(one, G, 4) > 0.98
    assert share_of_optimum(two, G, 4) > 0.999
    assert share_of_optimum(two, G, 4) > share_of_optimum(one, G, 4)


def test_a_gradient_of_lower_rank_than_the_factor_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 3, generator=generator), torch.randn(60, 3, generator=generator)
    batches = []
    for seed in range(3):
        code = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed))
        batches.append((code @ right.T, code @ left.T))
    G = sum(dy.T @ x for x, dy in batches) / 3
    for passes in (1, 2):
        sketch = collect(batches, rank=8, passes=passes)
        assert len(sketch.S) == 3
        torch.testing.assert_close((sketch.U * sketch.S) @ sketch.V.T, G, rtol=1e-4, atol=1e-4 * float(G.abs().max()))
        assert sketch.captured > 0.9999


def test_the_estimate_of_the_captured_share_is_near_the_truth() -> None:
    batches = [decaying(300, 120, 200, seed) for seed in range(4)]
    G = (sum(dy.T @ x for x, dy in batches) / 4).double()
    sketch = collect(batches, rank=12)
    truth = 1 - float((G - (sketch.U * sketch.S).double() @ sketch.V.double().T).square().sum() / G.square().sum())
    assert abs(sketch.captured - truth) < 0.05
    assert 0.3 < truth < 0.99  # otherwise the estimate was never put to a test


def test_it_stores_factors_only() -> None:
    sketch = collect([decaying(50, 96, 160, 0)], rank=8)
    assert [tuple(t.shape) for t in (sketch.U, sketch.S, sketch.V)] == [(96, 8), (8,), (160, 8)]


def test_more_directions_than_it_holds_are_refused() -> None:
    sketch = collect([decaying(50, 96, 160, 0)], rank=8)
    with pytest.raises(rw.errors.EvidenceError, match=r"holds 8 directions, expected at least 9"):
        sketch.svd(9)


def test_lora_ga_starts_from_a_sketch_nearly_as_from_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 24))
    data = [torch.randn(64, 32) for _ in range(4)]

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch)[:, :6].square().sum()

    exact = rw.gradients(model, data, method="exact", loss=loss)
    sketch = rw.gradients(model, data, method="sketch", rank=16, passes=2, loss=loss)
    energies = []
    for evidence in (exact, sketch):
        rw.attach(model, rw.LoRA(rank=2, init=rw.inits.LoraGA(scale="unit")), evidence=evidence)
        energies.append([])
        for pair in rw.pairs(model):
            G = exact[pair.name].matrix
            A, B = pair.A.detach(), pair.B.detach()
            moved = B @ (B.T @ G) + (G @ A.T) @ A
            energies[-1].append(float(1 - (moved - G).square().sum() / G.square().sum()))
        rw.detach(model)
    torch.testing.assert_close(torch.tensor(energies[1]), torch.tensor(energies[0]), rtol=1e-3, atol=1e-3)
    with pytest.raises(rw.errors.EvidenceError, match=r"align='adam' need the exact gradient"):
        rw.attach(model, rw.LoRA(rank=2, init=rw.inits.LoraGA(align="adam")), evidence=sketch)


def test_products_of_an_increment_are_those_of_the_gradient() -> None:
    torch.manual_seed(0)
    cases = [
        (LINEAR, nn.Linear(6, 5), torch.randn(2, 7, 6), torch.randn(2, 7, 5)),
        (CONV2D, nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), torch.randn(2, 6, 3, 3)),
    ]
    for kind, layer, x, grad_y in cases:
        G, increment = kind.gradient(layer, x, grad_y), kind.increment(layer, x, grad_y)
        Q, P = torch.randn(G.shape[1], 3), torch.randn(G.shape[0], 3)
        torch.testing.assert_close(increment.times(Q), G @ Q, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(increment.transposed_times(P), G.T @ P, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sketched"}, r"one of auto, exact, sketch, found 'sketched'; did you mean 'sketch'\?"),
        ({"method": "sketch", "rank": 0}, r"rank ≥ 1, oversample ≥ 1 and 1 or 2 passes, found rank=0"),
        ({"method": "sketch", "oversample": 0}, r"found rank=8, oversample=0"),
        ({"method": "sketch", "passes": 3}, r"found rank=8, oversample=4, passes=3"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(rw.errors.EvidenceError, match=message):
        rw.gradients(nn.Sequential(nn.Linear(4, 4)), [], **options)


def test_a_second_pass_goes_over_a_generators_batches_again() -> None:
    batches = [decaying(50, 24, 30, seed) for seed in range(3)]
    listed, generated = collect(batches, rank=8, passes=2), Bilinear(24, 30)
    found = rw.gradients(
        generated, iter(batches), ["layer"], "sketch", rank=2, passes=2, loss=lambda m, batch: m(*batch)
    )["layer"]
    torch.testing.assert_close(found.S, listed.S)


def test_four_times_the_rank_is_kept() -> None:
    sketch = collect([decaying(50, 96, 160, 0)], rank=3, oversample=4)
    assert len(sketch.S) == 12


def test_where_a_sketch_holds_little_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "rankwise")  # the command line asks for more, and may have run before
    torch.manual_seed(0)
    noise = (torch.randn(400, 90), torch.randn(400, 80))  # a flat spectrum: no few directions hold much
    collect([noise], rank=4)
    assert "in 1 of 1 layers the sketch holds less than 50 % of the gradient's energy (least in layer" in caplog.text
    caplog.clear()
    collect([decaying(200, 80, 90, 0)], rank=40)
    assert not caplog.text


def test_padding_does_not_count() -> None:
    x, grad_y = decaying(40, 24, 30, 0)
    padded = torch.cat([x, torch.randn(9, 30)]), torch.cat([grad_y, torch.zeros(9, 24)])
    plain, with_padding = collect([(x, grad_y)], rank=6), collect([padded], rank=6)
    torch.testing.assert_close(with_padding.S, plain.S)
    torch.testing.assert_close(with_padding.U, plain.U, rtol=1e-3, atol=1e-4)


class Shared(nn.Module):
    """One layer that runs twice in a forward, the way of ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x))).square().sum()


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_every_use_of_a_layer_that_runs_twice_counts(method: str) -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(30, 20)
    model(x).backward()
    G = model.layer.weight.grad.clone()
    found = rw.gradients(model, [x], ["layer"], method, rank=5, loss=lambda m, b: m(b))["layer"]
    u, s, v = found.svd(20)
    # fp32 turns a direction that is kept, at 3e-5 of the largest, by up to 6e-8 / 3e-5; a use left out is off by half.
    assert torch.linalg.matrix_norm((u * s) @ v.T - G, 2) <= 2e-3 * torch.linalg.matrix_norm(G, 2)
