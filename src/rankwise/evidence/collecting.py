"""One pass of a collection, carried out: batches through the model, or weights out of a file."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rankwise.collection import Collection, Pass
from rankwise.errors import EvidenceError
from rankwise.evidence.activations import input_covariances, input_directions
from rankwise.evidence.backward import Loss
from rankwise.evidence.exact import exact_gradients
from rankwise.evidence.sketch import SketchedGradient, sketched_gradients
from rankwise.evidence.weights import stored_weights

log = logging.getLogger("rankwise")

LOW_ENERGY = 0.5  # share of ‖G‖² below which the directions that are kept are few for this layer


def collect(
    model: nn.Module,
    collection: Collection,
    part: Pass,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    *,
    device: torch.device | str | None = None,
) -> Mapping[str, Any]:
    """The evidence of one pass: site name → what the initialisation's ``__call__`` takes.

    Args:
        collection: ``rankwise.plan(model, spec).evidence``.
        part: one of its passes.
        batches, loss: as in :func:`rankwise.attach`; batches that can be gone over once serve one pass.
        device: where exact gradients are added up; None: where they arise.

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
            return exact_gradients(model, layers, data, loss, device=device)
        case "sketch":
            sketches = sketched_gradients(model, layers, data, part.directions, loss, sweeps=part.sweeps)
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
