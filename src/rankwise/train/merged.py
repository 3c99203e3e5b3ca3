"""A saved adapter folded into its base model, as a plain transformers directory."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise as rw
from rankwise.errors import BaseMismatch, MergeError
from rankwise.files import read_json
from rankwise.merge import MergeReport
from rankwise.train.labels import read_labels
from rankwise.train.pretrained import load_classifier, load_pretrained


def save_merged(adapter: Path, base: str | None, out: Path) -> MergeReport:
    """Fold `adapter` into its base model (or `base`) and write model and tokenizer to `out`."""
    if out.exists() and any(out.iterdir()):
        raise MergeError(f"{out}: expected a new or empty directory for the merged model, found files. Choose another.")
    model, tokenizer = load_base(adapter, base)
    rw.load(model, adapter)
    report = rw.merge(model, keep_base=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return report


def load_base(adapter: Path, base: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that an adapter was made for, or `base`; a classifier's with a head for its labels."""
    labels = read_labels(adapter)
    if labels is None:
        return load_pretrained(base or base_of(adapter))
    model, tokenizer, _ = load_classifier(base or base_of(adapter), labels)
    return model, tokenizer


def base_of(adapter: Path) -> str:
    """The base model that an adapter's configuration names."""
    path = adapter / "adapter_config.json"
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise BaseMismatch(f"{path}: names no base model. Say which one with --base.")
    return name
