"""Between two steps of a run: pairs that start anew on top of what they learnt, or go on with fewer ranks.

The pairs stay the same parameters, whose shapes may change: no gradient may be on them, and what an optimizer keeps for
them no longer fits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted
from rankwise.adapter import one_of_each
from rankwise.algebra.low_rank import LowRank
from rankwise.attaching import activate, attach, detach
from rankwise.collection import Collection
from rankwise.errors import SpecError
from rankwise.evidence.backward import Loss
from rankwise.evidence.collecting import collect, collect_gradients
from rankwise.format.save_load import portable
from rankwise.inits.base import Init
from rankwise.methods import name_of
from rankwise.planning import plan
from rankwise.spec import LoRA
from rankwise.squeezing import Inputs, Squeezed, squeeze
from rankwise.variants import VARIANTS
from rankwise.variants.lora import LoraLayer

_FRESH = "fresh"  # the adapter that is on the model for a moment, so that its starts can be had


def check_restartable(spec: LoRA) -> None:
    """Refuse a spec whose pairs cannot start anew.

    Raises:
        SpecError: saying why.
    """
    _check_variant(spec, "restart", ("lora", "dora"))
    init = spec.init
    assert isinstance(init, Init)
    if not init.keeps_function or type(init).ranks is not Init.ranks:
        raise SpecError(
            f"restart: init {type(init).__name__} changes the model's function or its ranks, so that it fits a first "
            f"start only; expected another, such as kaiming or lora-ga"
        )


def check_narrowable(spec: LoRA, rank: int) -> None:
    """Refuse a spec whose pairs cannot be cut to ``rank``.

    Raises:
        SpecError: saying why.
    """
    _check_variant(spec, "squeeze", ("lora",))
    if rank >= spec.rank:
        raise SpecError(f"squeeze: expected a rank below the {spec.rank} that is trained, found {rank}")


def _check_variant(spec: LoRA, doing: str, known: tuple[str, ...]) -> None:
    variant = name_of(VARIANTS, spec.variant)
    if variant not in known or spec.anchor != "frozen":
        raise SpecError(
            f"{doing}: expected the variant {' or '.join(known)} with anchor='frozen', found {variant} with "
            f"anchor={spec.anchor!r}"
        )


def restart(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    *,
    seed: int,
    kept_rank: int | None = None,
    method: str = "auto",
    memory_budget: int | None = None,
) -> None:
    """Keep the active adapter's change, frozen, and begin its pairs anew with its own init.

    The model's function does not change, but for what ``kept_rank`` cuts off. An init that reads gradients or inputs
    sees those of the model as it is now; one that reads the weight sees the base's.

    Args:
        batches, loss, method, memory_budget: as in :func:`rankwise.attach`.
        seed: of the new start; with the first one's it would take the same random directions again.
        kept_rank: cut what is kept to this rank, at every site to what is nearest in the weights; None: all of it, so
            that each restart adds the pair's columns to it.
    """
    adapted = Adapted.of(model)
    name, root = adapted.adapter_name(None), adapted.root
    layers = _lora_layers(adapted, name)
    spec = replace(
        adapted.specs[name], seed=seed, target_modules=one_of_each(layers), exclude_modules=(), modules_to_save=()
    )
    planned = plan(root, spec, method=method, memory_budget=memory_budget)
    attach(root, spec, evidence=_present(root, planned.evidence, batches, loss), name=_FRESH)
    for path, fresh in _lora_layers(adapted, _FRESH).items():
        _begin_anew(layers[path], fresh, kept_rank)
    detach(root, _FRESH)
    activate(root, name)


def _present(
    root: nn.Module, collection: Collection, batches: Iterable[Any] | None, loss: Loss | None
) -> Mapping[str, Any]:
    """The evidence of the model as it is, its adapter included."""
    if collection.kind in ("exact", "sketch"):
        return collect_gradients(root, collection, () if batches is None else batches, loss)
    (part,) = collection.passes
    return collect(root, collection, part, batches, loss)


@torch.no_grad()
def _begin_anew(layer: LoraLayer, fresh: LoraLayer, kept_rank: int | None) -> None:
    change = layer.delta()
    kept = change if kept_rank is None or change.rank <= kept_rank else change.truncate(kept_rank)
    pair = {name: tensor for name, tensor in fresh.state_dict().items() if name in _OF_PAIR}
    _put(layer, {**pair, "earlier.A": kept.A, "earlier.B": kept.B * (kept.scale / layer.scale)})
    layer.notes = fresh.notes


def narrow(model: nn.Module, rank: int, *, inputs: Mapping[str, Inputs] | None = None) -> Squeezed:
    """Cut the active adapter's change to ``rank``, as :func:`rankwise.algebra.squeeze` does, and go on with that pair.

    What a pair started from, and what restarts kept, is part of the change: the new pair is all there is.
    """
    adapted = Adapted.of(model)
    squeezed = squeeze(portable(model), rank=rank, inputs=inputs)
    for path, layer in _lora_layers(adapted, adapted.adapter_name(None)).items():
        delta = squeezed.adapter.sites[path].delta
        _put(layer, {"lora_A": delta.A, "lora_B": delta.B})
    return squeezed


def shape_like(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the active adapter's pairs the shapes of a saved state (``rankwise.format.state``), to be read into them."""
    adapted = Adapted.of(model)
    for path, layer in _lora_layers(adapted, adapted.adapter_name(None)).items():
        tensors = {name: saved[f"{path}.{name}"] for name in _TENSORS if f"{path}.{name}" in saved}
        if tensors.keys() >= {"lora_A", "lora_B"}:  # else the reader says what is missing
            _put(layer, tensors)


_OF_PAIR = ("lora_A", "lora_B", "start_A", "start_B")
_TENSORS = (*_OF_PAIR, "earlier.A", "earlier.B")


class EarlierChange(nn.Module):
    """A change scale · B A that a layer's pair comes on top of. Not trained, saved with the layer's state."""

    A: Tensor
    B: Tensor

    def __init__(self, delta: LowRank) -> None:
        super().__init__()
        self.register_buffer("A", delta.A)
        self.register_buffer("B", delta.B)
        self.scale = delta.scale

    def delta(self) -> LowRank:
        """The change."""
        return LowRank(self.B, self.A, self.scale)


def _put(layer: LoraLayer, tensors: Mapping[str, Tensor]) -> None:
    """Make these, named as in the layer's state, the tensors of its pair, start and earlier change; it has no others."""
    like = layer.lora_A.data
    own = {name: tensor.detach().to(like, copy=True).contiguous() for name, tensor in tensors.items()}
    layer.lora_A.data, layer.lora_B.data = own["lora_A"], own["lora_B"]
    layer.start_A, layer.start_B = own.get("start_A"), own.get("start_B")
    layer.earlier = (
        EarlierChange(LowRank(own["earlier.B"], own["earlier.A"], layer.scale)) if "earlier.A" in own else None
    )
    layer.site = replace(layer.site, rank=len(layer.lora_A))


def _lora_layers(adapted: Adapted, name: str) -> dict[str, LoraLayer]:
    return {path: layer for path, layer in adapted.adapter_layers(name).items() if isinstance(layer, LoraLayer)}
