"""A model small enough to train in a second, saved as transformers saves one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny_llama, write_pairs


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
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("rankwise.report.figures.svg", lambda *_: "")
        monkeypatch.setattr("rankwise.train.run.run.save_loss_curve", lambda runs, path, *_: path)


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
