"""``rw.gradients``: the weight gradients of chosen layers as evidence, exact or sketched."""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.collection import SKETCH_OVERSAMPLE, Collection, gradient_collection
from rankwise.errors import EvidenceError
from rankwise.evidence.backward import Loss
from rankwise.evidence.cache import Gradients, cached, fingerprint
from rankwise.evidence.collecting import collect
from rankwise.evidence.undisturbed import repeatable
from rankwise.layers.kinds import kind_of
from rankwise.planning import target_layers
from rankwise.sites import Site


def gradients(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Iterable[str] = "all-linear",
    method: str = "exact",
    *,
    rank: int = 8,
    oversample: int = SKETCH_OVERSAMPLE,
    passes: int = 1,
    memory_budget: int | None = None,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
    loss: Loss | None = None,
) -> Gradients:
    """The weight gradients of the chosen layers, averaged over the batches.

    Under ``torch.distributed`` every process calls this with batches of its own and gets the mean over all.

    Args:
        batches: dicts for ``model(**batch)`` whose output has ``.loss``, or anything that ``loss(model, batch)`` takes.
        target_modules: as in ``LoRA``.
        method: "exact" keeps every G in fp32, out · in numbers a layer. "sketch" keeps a factor of
            ``oversample · rank`` directions, that many times (out + in) numbers, and never forms G. "auto" takes the
            exact ones where they fit into ``memory_budget`` in one go, else sketches, and logs which and why.
        rank: of the adapter that is to start from a sketch.
        passes: 2 lets a sketch go over the same batches again, for a closer factor.
        memory_budget: bytes that exact gradients may take at a time on the model's device. More than one group of
            layers then takes a pass over the batches each, and its gradients move to the CPU. "auto": 2 GiB if None.
        cache: a file that keeps what was collected; a later call with the same weights, batches and settings reads it.
        device: where exact gradients are added up; None: where they arise. "cpu" spares an accelerator.

    Returns:
        Module path → evidence; ``.svd(k)`` gives U [out, k], S [k], V [in, k].

    Raises:
        EvidenceError: an unknown method, no batches, a batch that the model cannot take, a layer that alone exceeds the
            budget, a cache that was collected with other weights, batches or settings. NoGradient: a layer got no
            gradient. NonFiniteGradient: NaN or infinity in the loss or a gradient. BrokenFile: the cache is no cache.
        The model is left exactly as it was.
    """
    if rank < 1 or oversample < 1 or passes not in (1, 2):
        raise EvidenceError(
            f"a sketch needs rank ≥ 1, oversample ≥ 1 and 1 or 2 passes, found {rank=}, {oversample=}, {passes=}"
        )
    sites = []
    for name, layer in target_layers(model, target_modules).items():
        kind = kind_of(layer)
        sites.append(Site(name, kind.name, kind.shape(layer), rank, 1.0))
    if method == "exact" and memory_budget is None:
        memory_budget = sys.maxsize  # all gradients are returned together, so only a device's memory limits them
    collection = gradient_collection(sites, method, memory_budget, oversample=oversample, sweeps=passes)
    return collect_gradients(model, collection, batches, loss, device=device, cache=cache)


def collect_gradients(
    model: nn.Module,
    collection: Collection,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
) -> Gradients:
    """The gradients of all passes together; of several passes, on the CPU. Arguments are those of :func:`gradients`."""
    if cache is not None:
        batches = repeatable(batches, 2)  # hashed once, collected from once
        settings = fingerprint(model, collection, batches, loss)
        anew = partial(collect_gradients, model, collection, batches, loss, device=device)
        return cached(Path(cache), settings, anew)
    several = len(collection.passes) > 1
    batches = repeatable(batches, len(collection.passes))
    evidence: dict[str, Any] = {}
    for part in collection.passes:
        gradients = collect(model, collection, part, batches, loss, device=device)
        evidence |= {name: gradient.cpu() for name, gradient in gradients.items()} if several else gradients
        del gradients  # before the next pass: only one pass's lie on the device
    return evidence
