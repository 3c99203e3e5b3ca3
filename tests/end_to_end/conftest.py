"""A model small enough to train in a second, and runs of it that make no more than is looked at."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny_llama, write_pairs

from rankwise.train.model.generation import before_and_after


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of one test wait busily for cores that another test has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a test marked `draws` has its drawings made: they take two thirds of so small a run."""

    def empty_curve(runs: object, path: Path, *_: str) -> Path:
        path.touch()
        return path

    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("rankwise.report.figures.svg", lambda *_: "")
        monkeypatch.setattr("rankwise.train.run.run.save_loss_curve", empty_curve)


@pytest.fixture(autouse=True)
def brief_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with held-out data ends with a sample of what the model writes: here of 8 tokens instead of 64."""
    monkeypatch.setattr("rankwise.train.tasks.causal_lm.before_and_after", partial(before_and_after, max_new_tokens=8))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a two-layer Llama and its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(path)
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Forty prompt/completion samples."""
    path = tmp_path / "pairs.jsonl"
    write_pairs(path)
    return path
