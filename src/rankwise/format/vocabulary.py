"""Whole embeddings in an adapter's file: PEFT puts them there where they are adapted, or their vocabulary was resized.

PEFT writes them into the base when it reads the file. Where they are the base's own, nothing is to be done; where the
model was resized for the adapter, the new rows are in no other file.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from rankwise.adapter import Adapter
from rankwise.errors import BaseMismatch, ShapeMismatch
from rankwise.foldable import parameter_owners
from rankwise.format.names import is_embedding, is_token_rows
from rankwise.patterns import keys_under
from rankwise.sites import base_modules

_MOST_CHANGED = 0.5  # share of the rows; of another base's weights all differ


def changed_embeddings(model: nn.Module, adapter: Adapter, biases: Iterable[str], source: Path) -> dict[str, Tensor]:
    """Name in the model → tensor, of the embeddings that the file has with other rows than the model, tied ones too.

    Args:
        biases: names of those that were trained.
        source: the file, for errors.

    Raises:
        ShapeMismatch: the model's vocabulary is another. BaseMismatch: it has no such layer, or of another base.
    """
    modules = base_modules(model)
    changed: dict[str, Tensor] = {}
    trained = {*keys_under(adapter.spec.modules_to_save, adapter.saved), *filter(is_token_rows, adapter.saved), *biases}
    for name in adapter.saved.keys() - trained:
        stored = adapter.saved[name]
        path, _, last = name.rpartition(".")
        own = modules[path]._parameters.get(last) if path in modules else None
        if own is None:
            raise BaseMismatch(f"{source}: has {name}, of a module that this model lacks; it is another base's")
        tied = [other for other in parameter_owners(model)[id(own)] if other.rpartition(".")[0] in modules]
        if not trained.isdisjoint(tied):  # and PEFT trained them as one
            changed[name] = stored
            continue
        replaceable = isinstance(modules[path], nn.Embedding) or is_embedding(name)
        if not _alike(source, name, stored, own, _MOST_CHANGED if replaceable else 0.0):
            changed |= dict.fromkeys(tied, stored)
    return changed


def _alike(source: Path, name: str, stored: Tensor, own: Tensor, most: float) -> bool:
    if stored.shape != own.shape:
        raise ShapeMismatch(
            f"{source}: {name} is {tuple(stored.shape)}, expected {tuple(own.shape)}; the vocabulary was resized for "
            f"the adapter: call model.resize_token_embeddings({stored.shape[0]}) first"
        )
    close = torch.isclose(stored.to(own), own.detach(), rtol=1e-2, atol=1e-6).flatten(1 if own.dim() > 1 else 0)
    changed = 1.0 - float((close.all(1) if own.dim() > 1 else close).float().mean())
    if changed > most:
        raise BaseMismatch(
            f"{source}: holds {name} whole, and {changed:.0%} of its rows are not this model's (expected at most "
            f"{most:.0%}, new tokens): the base was trained or is another; load that base first"
        )
    return changed == 0.0
