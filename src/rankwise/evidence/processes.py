"""Evidence under torch.distributed: every process sees batches of its own, and all end with the same sums.

In a single process each function returns what it was given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise.errors import EvidenceError, RankwiseError

T = TypeVar("T")


def process_count() -> int:
    """How many processes collect together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def everyones(value: T) -> list[T]:
    """Every process's value; tensors travel on the CPU."""
    values = [value] * process_count()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def summed(tensor: Tensor) -> Tensor:
    """The sum over processes, on the tensor's own device."""
    if process_count() == 1:
        return tensor
    shared = tensor.detach().to(_meeting_place()).clone()
    dist.all_reduce(shared)
    return shared.to(tensor.device)


def total(count: int) -> int:
    """The sum over processes of a number."""
    return int(summed(torch.tensor(count)))


@contextmanager
def failing_together() -> Iterator[None]:
    """Where one process fails, all do: none is left waiting for the others.

    Raises:
        EvidenceError: another process failed; its message is told.
    """
    error: RankwiseError | None = None
    try:
        yield
    except RankwiseError as failure:
        error = failure
    messages = everyones(None if error is None else str(error))
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise EvidenceError(f"process {number}: {message}")


def _meeting_place() -> torch.device:
    """Where the process group's tensors must lie."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator() or "cpu")
