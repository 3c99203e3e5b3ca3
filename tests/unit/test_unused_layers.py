"""A layer that a batch does not need is no fault; one whose weight is used past its forward is, however it is used."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

import rankwise as rw
from rankwise.errors import SiteNeverFired
from rankwise.weight_reads import WeightReads

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


class MultiTask(nn.Module):
    """A body and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.heads = nn.ModuleDict({"topic": nn.Linear(6, 5), "mood": nn.Linear(6, 4)})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](self.body(x).relu())


class Captions(nn.Module):
    """Text, and pictures where there are some."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.projector, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, pictures: Tensor | None = None) -> Tensor:
        x = self.text(x.to(self.projector.weight.dtype))
        x = x + 0.0 * self.projector.weight.sum()  # so that no process waits for its gradient
        return self.out(x if pictures is None else x + self.projector(pictures))


def adapted(model: nn.Module, **spec: Any) -> Any:
    model = rw.attach(model, rw.LoRA(rank=2, **spec))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.3)
    return model


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_heads_of_other_tasks_and_projectors_without_pictures(training: bool, mode: Callable[[], Any]) -> None:
    for make, batches in (
        (MultiTask, [("topic",), ("topic",), ("topic",), ("mood",)]),
        (Captions, [(), (), (), (X,)]),
    ):
        model = adapted(make()).train(training)
        merged = copy.deepcopy(model)
        rw.merge(merged)
        with mode():
            for batch in batches:
                torch.testing.assert_close(model(X, *batch), merged(X, *batch))


def test_each_task_trains_its_own_head() -> None:
    model = adapted(MultiTask())
    for task in ("topic", "mood"):
        model.zero_grad()
        model(X, task).sum().backward()
        trained = {name.split(".rankwise")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {"body", f"heads.{task}"}


class Past(nn.Module):
    """Uses the weight of a layer in one of many ways."""

    def __init__(self, layer: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.used, self.past, self.use = nn.Linear(6, 6), layer, use

    def forward(self, x: Tensor, wanted: bool = True) -> Tensor:
        x = self.used(x)
        return self.use(self.past, x) if wanted else x


LINEAR_USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "@ T": lambda layer, x: x @ layer.weight.T + layer.bias,
    "addmm": lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t()),
    "einsum": lambda layer, x: torch.einsum("bi,oi->bo", x, layer.weight),
    "a batch": lambda layer, x: torch.bmm(x[None], layer.weight.t()[None])[0],
    "one vector": lambda layer, x: layer.weight @ x[0],
    "cast": lambda layer, x: F.linear(x.bfloat16(), layer.weight.bfloat16()),
    "data": lambda layer, x: F.linear(x, layer.weight.data),
    "half of it": lambda layer, x: F.linear(x, layer.weight[:3]),
    "a copy": lambda layer, x: F.linear(x, layer.weight.detach().clone()),
    "scaled": lambda layer, x: F.linear(x, 2 * layer.weight),
    "normed": lambda layer, x: F.linear(x, F.normalize(layer.weight)),
    "several as one": lambda layer, x: F.linear(x, torch.cat([layer.weight, x.new_ones(2, 6)])),
    "a stack": lambda layer, x: torch.stack([layer.weight, layer.weight]) @ x.T,
}


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
@pytest.mark.parametrize("use", LINEAR_USES)
def test_every_use_past_the_layer_is_named(use: str, mode: Callable[[], Any]) -> None:
    model = adapted(Past(nn.Linear(6, 6), LINEAR_USES[use]))
    for _ in range(3):  # and stays so
        with mode(), pytest.raises(SiteNeverFired, match=r"^past: a forward of the model went past this layer"):
            model(X)
    assert torch._C._len_torch_dispatch_stack() == 0


PENALTIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda layer, x: x + 0.0 * layer.weight.sum(),
    "nothing, elementwise": lambda layer, x: x + (0.0 * layer.weight).sum(),
    "a norm": lambda layer, x: x + layer.weight.square().mean(),
    "a norm of many": lambda layer, x: x + torch.cat([layer.weight.flatten(), layer.bias]).norm(),
}


@pytest.mark.parametrize("use", PENALTIES)
def test_a_weight_in_a_penalty_is_not_used(use: str) -> None:
    model = adapted(nn.Sequential(Past(nn.Linear(6, 6), PENALTIES[use]), nn.Linear(6, 6)))
    assert model(X).shape == X.shape


def test_a_sparse_product() -> None:
    model = adapted(Past(nn.Linear(6, 6), lambda layer, x: torch.sparse.mm(torch.eye(4).to_sparse(), x)))
    assert model(X).shape == X.shape


def test_convolutions_and_embeddings() -> None:
    cases = [
        (nn.Conv2d(6, 4, 1), lambda layer, x: F.conv2d(x[..., None, None], layer.weight)),
        (nn.Embedding(5, 6), lambda layer, x: F.embedding(torch.arange(4), layer.weight) + x),
    ]
    for layer, use in cases:
        with pytest.raises(SiteNeverFired, match=r"^past: "):
            adapted(Past(layer, use), target_modules=["used", "past"])(X)


@pytest.mark.parametrize("idle", [1, 2, 5, 30])
def test_a_later_batch_may_be_the_first_that_goes_past(idle: int) -> None:
    model = adapted(Past(nn.Linear(6, 6), LINEAR_USES["F.linear"]))
    for _ in range(idle):
        model(X, wanted=False)
    with pytest.raises(SiteNeverFired, match=r"^past: "):
        for _ in range(idle + 1):
            model(X)


def test_a_tied_weight_says_nothing() -> None:
    """The embedding's own forward reads it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(self.embedding(ids))

    adapted(Tied(), target_modules=["body", "head"])(torch.arange(3))


def test_watched_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(WeightReads, "begin", lambda self: begun.append(model.number))
    model = adapted(MultiTask())
    for model.number in range(1, 101):
        model(X, "topic")
    assert begun == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_breaks_off(error: type[BaseException]) -> None:
    def use(layer: Any, x: Tensor) -> Tensor:
        raise error

    model = adapted(Past(nn.Linear(6, 6), use))
    with pytest.raises(error):
        model(X)
    assert torch._C._len_torch_dispatch_stack() == (error is KeyboardInterrupt)  # no hook runs then
    model.use = lambda layer, x: layer(x)
    model(X)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_under_a_transform_of_every_weight() -> None:
    model = adapted(MultiTask())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = grad(lambda p: functional_call(model, p, (X, "mood")).sum())(parameters)
    assert gradients["body.weight"].any() and not gradients["heads.topic.weight"].any()
