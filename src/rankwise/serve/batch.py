"""Rows that a model continues together, each with its own adapter: prompts go in, rows join and leave between steps.

Rows are padded on the left to one length; the mask keeps a row from its padding, and its positions are counted without
it. So a row's logits are those that it would have alone, but for rounding: a product of another shape is summed in
another order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import PretrainedError
from rankwise.shapes import Float, Int

_PADDING = 0  # any token: no row sees it


@dataclass
class Batch:
    """What the model remembers of some rows.

    Attributes:
        adapters: each row's adapter, by its name on the model; None: the base alone.
        mask: 1 at a row's tokens, 0 at its padding.
        cache: keys and values.
    """

    adapters: list[str | None]
    mask: Int[Tensor, "rows length"]
    cache: DynamicCache


def check_generates(model: PreTrainedModel) -> None:
    """Refuse a model whose memory is no cache of keys and values alone: rows could not be padded.

    Raises:
        PretrainedError: its layers keep a state (Mamba, linear attention).
    """
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if strange := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise PretrainedError(
            f"{type(model).__name__}: expected a model whose memory of a text is keys and values, found "
            f"{strange.pop().__name__}: rows of different lengths cannot go together. Use `rankwise generate`, or vLLM."
        )


@torch.no_grad()
def prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]
) -> tuple[Float[Tensor, "rows vocabulary"], Batch]:
    """Read prompts of any lengths (none empty).

    Returns:
        The logits of each one's next token, and the batch that they now are.
    """
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    ids = [[_PADDING] * count + list(prompt) for count, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * count + [1] * (length - count) for count in padding]
    batch = Batch(list(adapters), torch.tensor(mask, device=model.device), DynamicCache())
    return _next_logits(model, batch, torch.tensor(ids, device=model.device)), batch


@torch.no_grad()
def step(model: PreTrainedModel, batch: Batch, tokens: Sequence[int]) -> Float[Tensor, "rows vocabulary"]:
    """Append a token to each row, and return the logits of the next."""
    batch.mask = F.pad(batch.mask, (0, 1), value=1)
    return _next_logits(model, batch, torch.tensor(tokens, device=model.device)[:, None])


def _next_logits(
    model: PreTrainedModel, batch: Batch, ids: Int[Tensor, "rows new"]
) -> Float[Tensor, "rows vocabulary"]:
    positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": batch.mask,
        "position_ids": positions,
        "past_key_values": batch.cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    taken = inspect.signature(model.forward).parameters  # ALiBi's models take no positions
    with routed(model, batch.adapters):
        output = model(**{name: value for name, value in inputs.items() if name in taken})
    logits: Tensor = output.logits[:, -1]
    return logits


def routed(model: PreTrainedModel, adapters: Sequence[str | None]) -> AbstractContextManager[Any]:
    """Each row of the forwards inside with its adapter; a model without any is itself."""
    return nullcontext() if Adapted.find(model) is None else rw.route(model, adapters)


def joined(first: Batch, second: Batch) -> Batch:
    """The rows of both, the first one's first."""
    length = max(first.mask.shape[1], second.mask.shape[1])

    def together(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, length - part.shape[-2], 0)) for part in (one, other)])

    mask = together(first.mask[..., None], second.mask[..., None])[..., 0]
    return Batch([*first.adapters, *second.adapters], mask, _combined(together, first.cache, second.cache))


def kept(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some of the rows (one at least), without padding that they all have."""
    chosen = torch.tensor(rows, device=batch.mask.device)
    mask = batch.mask[chosen]
    start = int(mask.any(0).int().argmax())
    cache = _combined(lambda part: part[chosen][..., start:, :], batch.cache)
    return Batch([batch.adapters[row] for row in rows], mask[:, start:], cache)


def _combined(combine: Callable[..., Tensor], *caches: DynamicCache) -> DynamicCache:
    """A cache of what is made of some caches' keys and values, [rows, heads, length, size], layer by layer.

    A layer that uses another one's keys has none.
    """
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return DynamicCache(
        [
            (combine(*(layer.keys for layer in same)), combine(*(layer.values for layer in same)))
            if same[0].is_initialized
            else (None, None)
            for same in layers
        ]
    )
