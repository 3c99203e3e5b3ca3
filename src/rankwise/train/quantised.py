"""A saved adapter folded into its base for storage in few bits, as a plain transformers directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise as rw
from rankwise.quantising import QuantisedMerge
from rankwise.train.model.busy import busy
from rankwise.train.model.merged import base_of, check_new, check_size, load_base, outputs, write_model

if TYPE_CHECKING:
    from rankwise.train.data.dataset import Batch


@dataclass(frozen=True)
class Quantised:
    """What folding and rounding did.

    Attributes:
        weights: to the weights, per layer.
        divergence: mean KL(adapted ‖ merged) of what follows each token of a few lines of text, in nats.
    """

    weights: QuantisedMerge
    divergence: float


def save_quantised(
    adapter: Path,
    base: str | None,
    out: Path,
    to: str,
    console: Console,
    *,
    batches: str | None = None,
    batch_count: int = 32,
    max_shard_size: str = "5GB",
) -> Quantised:
    """Fold `adapter` into its base model (or `base`), round the weights to what a storage holds, write them to `out`.

    They are in the base's own precision: that storage's reader gives them its codes when it loads them, and loses
    nothing by it.

    Args:
        to: the storage, see :func:`rankwise.merge_quantised`.
        batches: data by whose inputs what is lost is weighed and made up for.
        batch_count: how many batches of it, of 4 samples of 128 tokens.

    Raises:
        MergeError: `out` holds files or lies in what is read; or see :func:`rankwise.merge_quantised`.
        WriteError: the system refuses. Nothing is written on either error.
    """
    check_new(out, adapter, base or base_of(adapter))
    check_size(max_shard_size)
    model, tokenizer, seen = _adapted(adapter, base, batches, batch_count, console)
    adapted = outputs(model, tokenizer)
    with busy(console, "Folding and rounding"):
        weights = rw.merge_quantised(model, to, batches=seen)
    divergence = mean_divergence(adapted, outputs(model, tokenizer))
    write_model(model, tokenizer, out, max_shard_size)
    return Quantised(weights, divergence)


def _adapted(
    adapter: Path, base: str | None, batches: str | None, count: int, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Batch] | None]:
    if batches is None:
        model, tokenizer = load_base(adapter, base)
        rw.load(model, adapter)
        return model, tokenizer, None
    from rankwise.train.adapter_alignment import with_batches  # it needs the trainer, which takes seconds to load

    prepared, seen = with_batches(adapter, base, batches, count, console)
    return prepared.model, prepared.tokenizer, seen


def mean_divergence(wanted: Tensor, logits: Tensor) -> float:
    """Mean KL(wanted ‖ given) over the positions of two models' outputs [..., vocab], in nats, in fp64."""
    given, target = (torch.log_softmax(each.double(), -1).flatten(0, -2) for each in (logits, wanted))
    return float(kl_div(given, target, reduction="batchmean", log_target=True))
