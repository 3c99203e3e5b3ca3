"""Input evidence against plain linear algebra on the inputs put together."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import EvidenceError, NonFiniteActivation
from rankwise.evidence.activations import RunningSVD
from rankwise.layers.kinds import CONV2D


class Tiny(nn.Module):
    """Tokens → vectors → two layers that share an input, one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.q = nn.Linear(12, 12)
        self.k = nn.Linear(12, 6)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(12, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.out(self.dropout(torch.tanh(self.q(x) + self.k(x).repeat(1, 1, 2))))


def make_batches(count: int = 3, *, masked: bool = False) -> list[dict[str, Tensor]]:
    found = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(50, (4, 7))}
        if masked:
            lengths = torch.randint(1, 8, (4, 1))
            batch["attention_mask"] = (torch.arange(7) < lengths).long()
        found.append(batch)
    return found


def seen_by_q(model: Tiny, batches: list[dict[str, Tensor]]) -> Tensor:
    rows = []
    for batch in batches:
        x = model.embed(batch["input_ids"]).flatten(0, 1)
        rows.append(x[batch["attention_mask"].flatten().bool()] if "attention_mask" in batch else x)
    return torch.cat(rows).detach()


@pytest.mark.parametrize("masked", [False, True])
def test_directions_are_those_of_all_inputs_together(masked: bool) -> None:
    model, batches = Tiny(), make_batches(masked=masked)
    found = rw.activations(model, batches, target_modules=["q", "out"], rank=4)["q"]
    X = seen_by_q(model, batches)
    _, s, vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert found.count == len(X)
    torch.testing.assert_close(found.singular_values, s[:4])
    torch.testing.assert_close((found.components @ vh[:4].T).abs(), torch.eye(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.explained, (s.square() / s.square().sum())[:4])


@pytest.mark.parametrize("masked", [False, True])
def test_covariance_is_that_of_all_inputs_together(masked: bool) -> None:
    model, batches = Tiny(), make_batches(masked=masked)
    found = rw.covariances(model, batches, target_modules=["q"])["q"]
    X = seen_by_q(model, batches)
    assert found.count == len(X) and found.matrix.dtype == torch.float32
    torch.testing.assert_close(found.matrix, X.T @ X / len(X))


def test_truncation_loses_little_over_many_batches() -> None:
    spectrum = 0.8 ** torch.arange(64.0)
    X = torch.randn(1024, 64) * spectrum + 3.0
    running = RunningSVD(16)
    for rows in X.split(64):
        running.add(rows)
    found = running.leading(8, "here")
    centred = X - X.mean(0)
    best = torch.linalg.svdvals(centred)[:8].square().sum()
    assert (centred @ found.components.T).square().sum() > 0.9999 * best
    assert running.variance == pytest.approx(float(centred.square().sum()), rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"padding": 1, "stride": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect", "dilation": 2}],
)
def test_a_convolutions_inputs_are_what_its_matrix_multiplies(groups: int, options: dict[str, object]) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=groups, bias=False, **options)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 9, 8)
    rows = CONV2D.inputs(conv, x)  # [2 · groups · positions, in]
    per_group = rows.unflatten(0, (2, groups, -1))
    matrices = conv.weight.flatten(1).unflatten(0, (groups, -1))
    y = torch.einsum("bgpi,goi->bgop", per_group, matrices).flatten(1, 2)
    torch.testing.assert_close(y, conv(x).flatten(2), atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = Tiny().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rw.activations(model, make_batches(), rank=2, target_modules=["q", "k", "out"])
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def failing() -> Iterator[dict[str, Tensor]]:
    yield from make_batches(1)
    raise OSError("disk gone")


def test_hooks_come_off_when_the_data_fails() -> None:
    model = Tiny().train()
    with pytest.raises(OSError, match="disk gone"):
        rw.covariances(model, failing(), target_modules=["q"])
    assert not model.q._forward_hooks and model.training


def test_a_forward_of_ones_own_takes_any_batch() -> None:
    model, batches = Tiny(), make_batches()
    plain = rw.covariances(model, batches, target_modules=["q"])["q"].matrix
    own = rw.covariances(
        model, [b["input_ids"] for b in batches], target_modules=["q"], forward=lambda m, ids: m(input_ids=ids)
    )["q"].matrix
    torch.testing.assert_close(own, plain)


def test_errors_name_the_layer() -> None:
    model = Tiny()
    with pytest.raises(EvidenceError, match="q: saw 28 input vectors"):
        rw.activations(model, make_batches(1), target_modules=["q"], rank=28)
    with pytest.raises(EvidenceError, match="embed: an embedding's inputs are ids"):
        rw.covariances(model, make_batches(1), target_modules=["embed"])
    with pytest.raises(EvidenceError, match="empty"):
        rw.covariances(model, [], target_modules=["q"])
    with pytest.raises(EvidenceError, match="wrap it in a list"):
        rw.covariances(model, make_batches(1)[0], target_modules=["q"])
    model.unused = nn.Linear(3, 3)
    with pytest.raises(EvidenceError, match="unused: saw 0"):
        rw.covariances(model, make_batches(1), target_modules=["q", "unused"])
    with torch.no_grad():
        model.q.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteActivation, match="out: its input holds NaN"):
        rw.activations(model, make_batches(1), target_modules=["q", "out"], rank=2)
    assert not model.q._forward_hooks
