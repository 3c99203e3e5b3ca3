"""A classifier's labels, beside its adapter: how many outputs its base model needs, and what they mean."""

from __future__ import annotations

import json
from pathlib import Path

from rankwise.errors import BrokenFile
from rankwise.files import read_limited
from rankwise.json_object import as_json

_FILE = "labels.json"


def save_labels(adapter: Path, labels: list[str]) -> None:
    """Write the labels in the order of the model's outputs."""
    (adapter / _FILE).write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")


def read_labels(adapter: Path) -> list[str] | None:
    """The labels of a classifier's adapter; None for any other adapter.

    Raises:
        BrokenFile: the file is not a list of names.
    """
    path = adapter / _FILE
    if not path.is_file():
        return None
    labels = as_json(str(path), read_limited(path))
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise BrokenFile(f"{path}: expected a list of labels, found {labels!r}.")
    return labels
