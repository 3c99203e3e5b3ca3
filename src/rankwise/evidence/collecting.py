"""Collections, carried out pass by pass: batches through the model, or weights out of a file."""

import logging
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.collection import SKETCH_OVERSAMPLE, Collection, Pass, gradient_collection
from rankwise.errors import EvidenceError
from rankwise.evidence.activations import input_covariances, input_directions
from rankwise.evidence.backward import Loss
from rankwise.evidence.cache import Gradients, cached, fingerprint
from rankwise.evidence.exact import exact_gradients
from rankwise.evidence.sketch import SketchedGradient, sketched_gradients
from rankwise.evidence.undisturbed import repeatable
from rankwise.evidence.weights import stored_weights
from rankwise.layers.kinds import kind_of
from rankwise.planning import target_layers
from rankwise.sites import Site

log = logging.getLogger("rankwise")

LOW_ENERGY = 0.5  # share of ‖G‖² below which the directions that are kept are few for this layer


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
    layers = target_layers(model, target_modules)
    sites = [Site(name, kind_of(layer).name, kind_of(layer).shape(layer), rank, 1.0) for name, layer in layers.items()]
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


def collect(
    model: nn.Module,
    collection: Collection,
    part: Pass,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    *,
    device: torch.device | str | None = None,
    idle: list[str] | None = None,
) -> Mapping[str, Any]:
    """The evidence of one pass: site name → what the initialisation's ``__call__`` takes.

    Args:
        collection: ``rankwise.plan(model, spec).evidence``.
        part: one of its passes.
        batches, loss: as in :func:`rankwise.attach`; batches that can be gone over once serve one pass.
        device: where exact gradients are added up; None: where they arise.
        idle: takes the names of layers that no gradient reached, which then have no evidence; None: they are an error.

    Raises:
        EvidenceError: no batches where they are needed, and what :func:`rankwise.gradients` and its siblings raise.

    >>> import torch, rankwise as rw
    >>> from rankwise.sites import site_generator
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> batches, loss = [torch.randn(5, 8)], lambda model, x: model(x).square().mean()
    >>> spec = rw.LoRA(rank=2, init="lora-ga")
    >>> planned = rw.plan(model, spec, method="sketch")
    >>> for part in planned.evidence.passes:
    ...     evidence = rw.evidence.collect(model, planned.evidence, part, batches, loss)
    ...     for site in part.sites:
    ...         weight, generator = model.get_submodule(site.name).weight, site_generator(spec.seed, site.name)
    ...         start = spec.init(weight, site, evidence[site.name], generator)
    ...         print(site.name, tuple(start.B.shape), tuple(start.A.shape))
    0 (16, 2) (2, 8)
    2 (4, 2) (2, 16)
    """
    if collection.from_batches and batches is None:
        raise EvidenceError(
            f"init {collection.init} starts from {collection.title}: pass batches=... (a few batches of the training "
            f"data), or evidence=... collected before"
        )
    data: Iterable[Any] = () if batches is None else batches
    layers = {site.name: model.get_submodule(site.name) for site in part.sites}
    if collection.from_batches:
        log.info("%s for %d sites: %s", collection.title, len(layers), collection.reason)
    match collection.kind:
        case "nothing":
            return dict.fromkeys(layers)
        case "exact":
            return exact_gradients(model, layers, data, loss, device=device, idle=idle)
        case "sketch":
            sketches = sketched_gradients(model, layers, data, part.directions, loss, sweeps=part.sweeps, idle=idle)
            _warn_of_low_energy(sketches)
            return sketches
        case "activations":
            return input_directions(model, layers, data, part.directions, loss)
        case "covariance":
            return input_covariances(model, layers, data, loss)
        case "weights":
            return stored_weights(_reference(collection), layers)
        case "given":
            raise EvidenceError("this evidence was collected before: there is nothing to collect")


def _reference(collection: Collection) -> str:
    if collection.reference is None:
        raise EvidenceError(
            f"init {collection.init} starts from the full-precision weights: give its reference= a safetensors file "
            f"of them, or pass evidence=rankwise.weights(full_precision_model)"
        )
    return collection.reference


def _warn_of_low_energy(sketches: Mapping[str, SketchedGradient]) -> None:
    """Name the layers of which a sketch holds little."""
    low = {name: sketch.captured for name, sketch in sketches.items() if sketch.captured < LOW_ENERGY}
    if low:
        worst = min(low, key=low.__getitem__)
        log.warning(
            "gradients: in %d of %d layers the sketch holds less than %.0f %% of the gradient's energy (least in %s, "
            "%.0f %%): a higher rank would capture more of the first step there",
            *(len(low), len(sketches), 100 * LOW_ENERGY, worst, 100 * low[worst]),
        )
