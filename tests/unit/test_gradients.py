"""rw.gradients: exactly autograd's weight gradients, from a frozen model, leaving no trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import LAYERS, left_as_it_was, relative, zoo_and_inputs

import rankwise as rw
from rankwise.errors import EvidenceError, NoGradient, NonFiniteGradient, TargetError
from rankwise.layers.kinds import kind_of, kind_or_none


def autograd(model: nn.Module, batches: list, loss) -> dict[str, Tensor]:
    """The oracle: every weight's own .grad, averaged over the batches, in evaluation mode."""
    model.eval()
    names = {n: m for n, m in model.named_modules() if kind_or_none(m)}
    for m in names.values():
        m.weight.requires_grad_(True)
    total = sum(loss(model, b) for b in batches) / len(batches)
    grads = torch.autograd.grad(total, [m.weight for m in names.values()], allow_unused=True)
    return {n: kind_of(m).matrix(m, g) for (n, m), g in zip(names.items(), grads, strict=True) if g is not None}


def test_every_kind_of_layer():
    zoo, inputs = zoo_and_inputs(torch.float64)
    batches = [inputs, {k: x.flip(0)[:2] for k, x in inputs.items()}]
    expected = autograd(zoo, batches, lambda m, b: m(**b).loss)
    zoo.requires_grad_(False)
    found = rw.gradients(zoo, batches, list(LAYERS))
    assert set(found) == set(LAYERS)
    for name, evidence in found.items():
        assert relative(evidence.matrix, expected[name]) < 1e-12, name
        assert evidence.energy == pytest.approx(float(expected[name].square().sum()))


def test_gradients_of_a_bf16_model_are_summed_in_fp32():
    zoo, inputs = zoo_and_inputs(torch.bfloat16, ["linear", "conv2d"])
    found = rw.gradients(zoo, [inputs] * 3, ["linear", "conv2d"])
    expected = autograd(zoo, [inputs], lambda m, b: m(**b).loss)
    for name, evidence in found.items():
        assert evidence.matrix.dtype == torch.float32
        assert relative(evidence.matrix, expected[name]) < 1e-2, name


@pytest.mark.parametrize("k", [1, 5, 10])
def test_svd_gives_the_leading_triplets(k: int):
    zoo, inputs = zoo_and_inputs(torch.float64, ["linear"])
    evidence = rw.gradients(zoo, [inputs], ["linear"])["linear"]
    u, s, v = evidence.svd(k)
    exact = torch.linalg.svdvals(evidence.matrix)
    assert (u.shape, s.shape, v.shape) == ((10, k), (k,), (12, k))
    assert relative(s, exact[:k]) < 1e-10
    assert relative(u.T @ evidence.matrix @ v, torch.diag(s)) < 1e-10


def test_a_padding_row_gets_no_gradient():
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=2)).double()
    ids = torch.tensor([[0, 2, 2, 3, 6]])
    expected = autograd(model, [ids], lambda m, b: m(b).square().sum())
    found = rw.gradients(model, [ids], ["0"], loss=lambda m, b: m(b).square().sum())
    assert not expected["0"][:, 2].any()
    assert relative(found["0"].matrix, expected["0"]) < 1e-12


class Reused(nn.Module):
    """One module called twice, and three that share an input."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(torch.tanh(self.shared(x)))
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def _square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_a_module_called_twice_and_inputs_shared():
    model, x = Reused().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    expected = autograd(model, [x], _square)
    found = rw.gradients(model, [x], loss=_square)
    assert set(found) == {"shared", "q", "k", "v"}
    for name, evidence in found.items():
        assert relative(evidence.matrix, expected[name]) < 1e-12, name


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.blocks, self.reentrant = nn.Linear(6, 6), nn.ModuleList(Reused() for _ in range(2)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x

    def plain(self) -> "Checkpointed":
        other = copy.deepcopy(self)
        other.reentrant = None
        return other


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gradient_checkpointed_model(reentrant: bool):
    model, x = Checkpointed(reentrant).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    expected = autograd(Checkpointed.plain(model), [x], _square)
    if reentrant:  # as its users must: without an input that requires grad it cuts the graph
        x.requires_grad_()
    found = rw.gradients(model, [x], loss=_square)
    assert len(found) == 9
    for name, evidence in found.items():
        assert relative(evidence.matrix, expected[name]) < 1e-12, name


def test_a_vector_without_batch_axes():
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(4, dtype=torch.float64)
    found = rw.gradients(model, [x], loss=lambda m, b: m(b).square().sum())
    expected = autograd(model, [x], lambda m, b: m(b).square().sum())
    assert relative(found["0"].matrix, expected["0"]) < 1e-12


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.dropout(self.norm(self.inner(x)), 0.5, self.training))


def test_the_model_is_left_as_it_was_and_dropout_is_off():
    model, x = WithDropout().double().train(), torch.randn(9, 6, dtype=torch.float64)
    model.norm.eval()
    model.inner.bias.requires_grad_(False)
    with left_as_it_was(model):
        found = rw.gradients(model, [x], loss=_square)
    assert all(p.grad is None for p in model.parameters())
    expected = autograd(model, [x], _square)
    assert relative(found["inner"].matrix, expected["inner"]) < 1e-12


def test_inference_of_existing_grads_is_not_disturbed():
    model, x = WithDropout(), torch.randn(9, 6)
    model.inner.weight.grad = torch.ones_like(model.inner.weight)
    rw.gradients(model, [x], loss=_square)
    assert torch.equal(model.inner.weight.grad, torch.ones_like(model.inner.weight))
    with torch.no_grad():  # a caller's no_grad does not turn the gradients off
        assert rw.gradients(model, [x], loss=_square)["inner"].energy > 0


def test_no_batches():
    model = WithDropout()
    with left_as_it_was(model), pytest.raises(EvidenceError, match=r"batches is empty.*at least one"):
        rw.gradients(model, [], loss=_square)


def test_one_batch_in_the_place_of_a_list_of_batches():
    model = WithDropout()
    with left_as_it_was(model), pytest.raises(EvidenceError, match=r"iterable of batches, found one Tensor.*list"):
        rw.gradients(model, torch.randn(3, 6), loss=_square)


def test_a_batch_that_is_no_dict_and_a_model_without_loss():
    model = WithDropout()
    with left_as_it_was(model), pytest.raises(EvidenceError, match=r"a batch is a Tensor; expected a dict.*loss="):
        rw.gradients(model, [torch.randn(3, 6)])
    with left_as_it_was(model), pytest.raises(EvidenceError, match=r"keys \['x'\] returned no loss.*'labels'"):
        rw.gradients(model, [{"x": torch.randn(3, 6)}])


def test_a_layer_without_gradient_is_named():
    model = Reused()
    with left_as_it_was(model), pytest.raises(NoGradient, match=r"^q: no gradient reached.*exclude_modules"):
        rw.gradients(model, [torch.randn(2, 5, 6)], loss=lambda m, x: m.v(m.shared(x)).square().mean() + m.k(x).sum())


def test_a_loss_that_depends_on_no_target():
    model = Reused()
    with left_as_it_was(model), pytest.raises(NoGradient, match=r"batch 0: the loss depends on none of the 4"):
        rw.gradients(model, [torch.randn(2, 5, 6)], loss=lambda m, x: x.sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(bad: float):
    model = Reused()
    batches = [torch.randn(2, 5, 6), torch.full((2, 5, 6), bad)]
    with left_as_it_was(model), pytest.raises(NonFiniteGradient, match=r"batch 1: the loss is nan.*finite"):
        rw.gradients(model, batches, loss=_square)


def test_a_gradient_that_is_not_finite_though_the_loss_is():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return (m(x) * 0).square().sum().sqrt()  # the slope of √ at 0

    with left_as_it_was(model), pytest.raises(NonFiniteGradient, match=r"^0: its gradient holds NaN or infinity"):
        rw.gradients(model, [torch.randn(4, 3)], loss=loss)


def test_an_error_in_the_callers_loss_passes_through_and_leaves_no_trace():
    model = Reused().train()
    model.q.eval()

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        m(x)
        raise KeyError("the caller's own")

    with left_as_it_was(model), pytest.raises(KeyError, match="the caller's own"):
        rw.gradients(model, [torch.randn(2, 5, 6)], loss=loss)


def test_an_input_changed_in_place_is_noticed():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y = self.second(x)
            x.mul_(2)
            return h + y

    model = InPlace()
    with left_as_it_was(model), pytest.raises(EvidenceError, match=r"(first|second): its input was changed in place"):
        rw.gradients(model, [torch.randn(2, 4)], loss=_square)


def test_wrong_targets_and_methods():
    model = Reused()
    with pytest.raises(TargetError, match="'nothing'"):
        rw.gradients(model, [torch.randn(2, 5, 6)], ["nothing"], loss=_square)
    with pytest.raises(EvidenceError, match=r"method must be one of auto, exact, sketch, found 'guess'"):
        rw.gradients(model, [torch.randn(2, 5, 6)], method="guess", loss=_square)


def test_a_loss_with_a_gradient_penalty_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))

    def penalised(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        value = model(x).square().sum()
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + slope.square().sum()

    with left_as_it_was(model), pytest.raises(EvidenceError, match=r"^2: the loss differentiates through the model"):
        rw.gradients(model, [torch.randn(3, 6)], loss=penalised)
