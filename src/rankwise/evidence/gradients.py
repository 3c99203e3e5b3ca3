"""``rw.gradients``: the weight gradients of chosen layers as evidence, exact or sketched."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from rankwise.errors import EvidenceError
from rankwise.evidence.backward import Loss
from rankwise.evidence.exact import ExactGradient, exact_gradients
from rankwise.evidence.sketch import SketchedGradient, sketched_gradients
from rankwise.plan import target_layers
from rankwise.registry import nearest


def gradients(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Iterable[str] = "all-linear",
    method: str = "exact",
    *,
    rank: int = 32,
    passes: int = 1,
    loss: Loss | None = None,
) -> Mapping[str, ExactGradient] | Mapping[str, SketchedGradient]:
    """The weight gradients of the chosen layers, averaged over the batches.

    Args:
        batches: dicts for ``model(**batch)`` whose output has ``.loss``, or anything that ``loss(model, batch)`` takes.
        target_modules: as in ``LoRA``.
        method: "exact" keeps every G in fp32, out · in numbers a layer. "sketch" keeps a factor of ``rank``
            directions, rank · (out + in) numbers, and never forms G.
        rank: directions that a sketch keeps; four times the adapter's rank serves LoRA-GA.
        passes: 2 lets a sketch go over the same batches again, for a closer factor; they must then be a list.

    Returns:
        Module path → evidence; ``.svd(k)`` gives U [out, k], S [k], V [in, k].

    Raises:
        EvidenceError: an unknown method, no batches, or a batch that the model cannot take.
        NoGradient: a layer got no gradient. NonFiniteGradient: NaN or infinity in the loss or a gradient.
        The model is left exactly as it was.
    """
    layers = target_layers(model, target_modules)
    if method == "exact":
        return exact_gradients(model, layers, batches, loss)
    if method != "sketch":
        raise EvidenceError(
            f"method must be 'exact' or 'sketch', found {method!r}{nearest(method, ('exact', 'sketch'))}"
        )
    if rank < 1 or passes not in (1, 2):
        raise EvidenceError(f"a sketch needs rank ≥ 1 and 1 or 2 passes, found rank={rank}, passes={passes}")
    if passes == 2 and not isinstance(batches, Sequence):
        raise EvidenceError(f"passes=2 goes over the batches again; expected a list, found a {type(batches).__name__}")
    return sketched_gradients(model, layers, batches, dict.fromkeys(layers, rank), loss, passes=passes)
