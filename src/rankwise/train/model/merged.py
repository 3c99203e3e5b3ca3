"""A saved adapter folded into its base model, as a plain transformers directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise as rw
from rankwise.adapted.merge import MOST_LOST, MergeReport
from rankwise.disk import whole_directory
from rankwise.errors import BaseMismatch, MergeError
from rankwise.files import check_directory_name, read_json, settled
from rankwise.format.names import CONFIG, FILES
from rankwise.train.data.labels import read_labels
from rankwise.train.model.pretrained import load_classifier, load_pretrained

_PROBE = (
    "The merged model must say what the adapted one says. To see whether it does, both read these lines: a sentence in "
    "English, numbers such as 3.14159 and 2,718, and a line of code: for i in range(10): print(i * i)"
)


@dataclass(frozen=True)
class Merged:
    """What folding did.

    Attributes:
        weights: to the weights, per site.
        logit_gap: largest difference of an output over the largest output, adapted and merged, on a few lines of text.
    """

    weights: MergeReport
    logit_gap: float


def save_merged(
    adapter: Path, base: str | None, out: Path, *, most_lost: float = MOST_LOST, max_shard_size: str = "5GB"
) -> Merged:
    """Fold `adapter` into its base model (or `base`); write model, generation config and tokenizer to `out`.

    `out` comes into being whole, by a rename at the end, or not at all.

    Args:
        most_lost: as for :func:`rankwise.adapted.merge`.
        max_shard_size: of one file of weights, as transformers takes it.

    Raises:
        MergeError: `out` holds files or lies in what is read, or too much would be lost.
        WriteError: the system refuses. Nothing is written on either error.
    """
    check_new(out, adapter, base or base_of(adapter))
    check_size(max_shard_size)
    model, tokenizer = load_base(adapter, base)
    rw.load(model, adapter)
    adapted = outputs(model, tokenizer)
    weights = rw.merge(model, keep_base=False, most_lost=most_lost)
    gap = _largest_gap(adapted, outputs(model, tokenizer))
    write_model(model, tokenizer, out, max_shard_size)
    return Merged(weights, gap)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, max_shard_size: str) -> None:
    """A transformers directory that comes into being whole, or not at all."""
    with whole_directory(out) as directory:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(directory)


def check_size(max_shard_size: str) -> None:
    """Refuse what transformers does not take for a size."""
    if re.fullmatch(r"\d+(\.\d+)?([KMGT]i?)?B", max_shard_size, re.IGNORECASE) is None:
        raise MergeError(f"max_shard_size: expected a size such as 5GB or 500MB, found {max_shard_size!r}")


def check_new(out: Path, *read: Path | str | None) -> None:
    """Refuse a directory that cannot be new, or lies in one that is read."""
    check_directory_name(out)
    for source in read:
        if source is not None and Path(source).exists() and out.resolve().is_relative_to(Path(source).resolve()):
            raise MergeError(
                f"{out}: lies in {source}, which is read; expected another directory for the merged model."
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out}: expected a new or empty directory for the merged model, found files. Choose another.")
    if out.is_mount():
        raise MergeError(f"{out}: is a mount point, which no new directory can replace. Name a directory in it.")


@torch.no_grad()
def outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the model says of a few lines of text."""
    training = model.training
    longest = min(64, getattr(model.config, "max_position_embeddings", 64))
    inputs = tokenizer(_PROBE, return_tensors="pt", truncation=True, max_length=longest).to(model.device)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    logits: Tensor = model.eval()(**inputs).logits.float()
    model.train(training)
    return logits


def _largest_gap(before: Tensor, after: Tensor) -> float:
    gap = float((after - before).abs().max() / before.abs().max())
    if not gap < float("inf"):  # NaN neither
        raise MergeError(f"the merged model's outputs differ by {gap} from the adapted one's; expected finite outputs")
    return gap


def load_base(adapter: Path, base: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that an adapter was made for, or `base`; a classifier's with a head for its labels."""
    labels = read_labels(adapter)
    if labels is None:
        return load_pretrained(base or base_of(adapter))
    model, tokenizer, _ = load_classifier(base or base_of(adapter), labels)
    return model, tokenizer


def base_of(adapter: Path) -> str:
    """The base model that an adapter's configuration names.

    It may be a path, as after a run here: what is read from there are safetensors and JSON, and no code is run.
    """
    path = adapter / CONFIG
    name = settled(adapter, FILES, lambda: read_json(path)).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise BaseMismatch(f"{path}: names no base model. Say which one with --base.")
    return name
