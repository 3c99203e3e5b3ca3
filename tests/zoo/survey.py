"""One architecture through the whole life of an adapter: what works, and what is refused and why.

plan → attach (plain, then from gradients) → the start is exact → a step → save → load is the same → merge is the same →
detach gives every bit back.
"""

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import RankwiseError
from zoo.architectures import batch_for, build, output

STARTS = ("kaiming", "lora-ga")
SECONDS = 120


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    Attributes:
        outcome: "works"; "refused", by name; "wrong"; "not built", by transformers or as no tiny model.
        sites: adapted layers.
        why: the message; of what works, what was left out.
    """

    name: str
    outcome: str
    model: str = ""
    sites: int = 0
    why: str = ""


class Wrong(AssertionError):
    """A law does not hold."""


def survey(name: str) -> Row:
    """The row of one architecture."""
    try:
        model = build(name)  # with imports, which nothing may interrupt
        batch = batch_for(model)
        with limited(SECONDS), torch.no_grad():
            first, second = output(model, batch), output(model, batch)
            if not torch.equal(first, second) or not bool(torch.isfinite(first).all()):
                raise ValueError("two forwards differ, or are not finite")
            if float(first.abs().max()) < 1e-6:
                raise ValueError("the signal fades out in a random model of this size")
    except Exception as error:  # noqa: BLE001  # whatever transformers raises
        return Row(name, "not built", why=_said(error))
    kind = type(model).__name__
    try:
        with limited(SECONDS):
            planned = rw.plan(model, rw.LoRA(rank=2))
            for start in STARTS:
                live(model, batch, start)
    except RankwiseError as error:
        return Row(name, "refused", kind, why=_said(error))
    except Exception as error:  # noqa: BLE001  # a crash is as wrong as a wrong number
        return Row(name, "wrong", kind, why=_said(error))
    return Row(name, "works", kind, len(planned), "; ".join(planned.left_out))


def live(original: nn.Module, batch: dict[str, Tensor], start: str) -> None:
    """The life of one adapter.

    Raises:
        Wrong: a law does not hold.
    """
    model = deepcopy(original)
    clean, pretrained = {key: value.clone() for key, value in model.state_dict().items()}, value_of(model, batch)
    rw.attach(model, rw.LoRA(rank=2, init=start), batches=[batch], loss=loss)
    _check("the start", value_of(model, batch), pretrained, 0.0)
    optimizer = torch.optim.Adam(rw.trainable_parameters(model), lr=1e-2)
    loss(model, batch).backward()
    optimizer.step()
    trained = value_of(model, batch)
    if trained.shape == pretrained.shape and torch.equal(trained, pretrained):
        raise Wrong("a step changes nothing")
    with tempfile.TemporaryDirectory() as directory:
        rw.save(model, directory)
        _check("loaded", value_of(rw.load(deepcopy(original), directory), batch), trained, 1e-4)
    rw.merge(model, most_lost=1.0)
    _check("merged", value_of(model, batch), trained, 1e-3)
    rw.detach(model)
    kept = model.state_dict()
    if kept.keys() != clean.keys() or not all(torch.equal(kept[key], value) for key, value in clean.items()):
        raise Wrong("detached, some tensors are not the pretrained ones")


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Some scalar of the model's output, with a gradient for all of it."""
    y = output(model, batch).float()
    weights = torch.linspace(-1.0, 1.0, y.shape[-1])
    return (y * weights).mean() + y.square().mean()


def value_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return output(model, batch)


def _check(what: str, y: Tensor, expected: Tensor, tolerance: float) -> None:
    gap = float((y - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not gap <= tolerance:
        raise Wrong(f"{what}: the output is off by {gap:.1e}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Give up after so long."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
