"""Training in a random subspace, against P written out."""

import pytest
import torch

import rankwise as rw
from rankwise.analysis import leave_random_subspace, train_in_random_subspace
from rankwise.errors import AttachError, SpecError


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 4))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def written_out(net: torch.nn.Module) -> tuple[torch.Tensor, torch.nn.Parameter]:
    """P as a dense matrix [D, d], its rows in the layers' order."""
    blocks = []
    for layer in (net[0], net[2]):
        projected = layer.parametrizations.weight[0]
        d = len(projected.theta)
        block = torch.zeros(projected.picks.numel(), d)
        for row, pick in enumerate(projected.picks.flatten().tolist()):
            block[row, pick % d] = projected.c * (-1.0 if pick >= d else 1.0)
        blocks.append(block)
    return torch.cat(blocks), net[0].parametrizations.weight[0].theta


def test_the_start_is_the_pretrained_model_and_leaving_gives_it_back():
    net = model()
    before, weights = net(X), {key: value.clone() for key, value in net.state_dict().items()}
    train_in_random_subspace(net, 5)
    assert torch.equal(net(X), before)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert [p.numel() for p in trained] == [5]
    with torch.no_grad():
        trained[0].normal_()
    assert not torch.equal(net(X), before)
    leave_random_subspace(net)
    assert net.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(X), before)


def test_the_step_and_its_gradient_are_those_of_the_dense_projection():
    net, plain = train_in_random_subspace(model(), 7, seed=3), model()
    P, theta = written_out(net)
    with torch.no_grad():
        theta.copy_(torch.randn(7, generator=torch.Generator().manual_seed(2)))
        moved = P @ theta
        plain[0].weight += moved[:60].view(10, 6)
        plain[2].weight += moved[60:].view(4, 10)
    assert torch.allclose(net(X), plain(X), atol=1e-6)
    net(X).square().sum().backward()
    plain(X).square().sum().backward()
    G = torch.cat([plain[0].weight.grad.flatten(), plain[2].weight.grad.flatten()])
    assert torch.allclose(theta.grad, P.T @ G, rtol=1e-4, atol=1e-5)


def test_columns_are_orthogonal_and_lengths_are_kept():
    net = torch.nn.Sequential(torch.nn.Linear(200, 100))
    P, _ = written_out_one(train_in_random_subspace(net, 20))
    gram = P.T @ P
    assert torch.equal(gram - torch.diag(gram.diagonal()), torch.zeros(20, 20))
    assert float(gram.trace()) / 20 == pytest.approx(1.0, abs=1e-5)
    assert gram.diagonal().sub(1).abs().max() < 0.15  # 1000 ± 32 weights a coordinate


def written_out_one(net: torch.nn.Module) -> tuple[torch.Tensor, torch.nn.Parameter]:
    net = torch.nn.Sequential(net[0], torch.nn.Identity(), net[0])
    P, theta = written_out(net)
    return P[: len(P) // 2], theta


def test_layer_scales_are_among_the_trained_numbers():
    net = train_in_random_subspace(model(), 9, layer_scales=True)
    before = net(X)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 9
    with torch.no_grad():
        net[0].parametrizations.weight[0].theta.normal_()
    once = net(X) - before
    net(X).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.parametrizations.weight[0].gain.zero_()
    assert torch.equal(net(X), before)
    assert bool(once.any())


def test_it_is_the_same_for_the_same_seed_whatever_was_drawn_before():
    one, _ = written_out(train_in_random_subspace(model(), 5, seed=1))
    torch.randn(100)
    two, _ = written_out(train_in_random_subspace(model(), 5, seed=1))
    other, _ = written_out(train_in_random_subspace(model(), 5, seed=2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("dimension", "scales"), [(0, False), (2, True), (101, False)])
def test_a_dimension_that_cannot_be(dimension, scales):
    with pytest.raises(SpecError, match="dimension"):
        train_in_random_subspace(model(), dimension, layer_scales=scales)


def test_a_weight_that_cannot_be_projected():
    net = train_in_random_subspace(model(), 5)
    with pytest.raises(AttachError, match="plain floating point weight"):
        train_in_random_subspace(net, 5)


def test_targets_are_chosen_as_an_adapters_are():
    net = train_in_random_subspace(model(), 5, ["2"])
    assert not torch.nn.utils.parametrize.is_parametrized(net[0])
    with pytest.raises(rw.errors.TargetError):
        train_in_random_subspace(model(), 5, ["fc"])
