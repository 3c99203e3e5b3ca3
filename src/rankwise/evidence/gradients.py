"""``rw.gradients``: the weight gradients of chosen layers as evidence, exact or sketched."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rankwise.errors import EvidenceError
from rankwise.evidence.backward import Loss
from rankwise.evidence.cache import Gradients, cached, fingerprint
from rankwise.evidence.exact import ExactGradient, exact_gradients, gradient_bytes, groups_within
from rankwise.evidence.sketch import SketchedGradient, sketched_gradients
from rankwise.evidence.undisturbed import each_batch, repeatable, undisturbed
from rankwise.methods import nearest
from rankwise.planning import target_layers

log = logging.getLogger("rankwise")

GRADIENT_METHODS = ("auto", "exact", "sketch")
OVERSAMPLE = 4  # a sketch keeps this many times the adapter's rank; LoRA-GA uses twice the rank
AUTO_BUDGET = 2 * 2**30  # bytes of gradients up to which "auto" takes the exact ones
LOW_ENERGY = 0.5  # share of ‖G‖² below which the directions that are kept are few for this layer


def gradients(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Iterable[str] = "all-linear",
    method: str = "exact",
    *,
    rank: int = 8,
    oversample: int = OVERSAMPLE,
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
    chosen = choose_method(method, layers, memory_budget)
    if chosen == "sketch":
        widths = dict.fromkeys(layers, oversample * rank)
        settings: dict[str, Any] = {"method": chosen, "directions": oversample * rank, "passes": passes}

        def collect(batches: Iterable[Any]) -> Gradients:
            return sketch_with_warning(model, layers, batches, widths, loss, passes=passes)

    else:
        settings = {"method": chosen}

        def collect(batches: Iterable[Any]) -> Gradients:
            return _exact(model, layers, batches, loss, memory_budget, device)

    if cache is None:
        return collect(batches)
    listed = batches if isinstance(batches, Sequence) else list(each_batch(batches))
    found = fingerprint(model, listed, settings | {"layers": list(layers)})
    found["loss"] = "" if loss is None else _first_value(model, listed, loss)
    return cached(Path(cache), found, lambda: collect(listed))


def _first_value(model: nn.Module, batches: Iterable[Any], loss: Loss) -> str:
    """By which another loss function is recognised, whatever its name: its value on the first batch."""
    with undisturbed(model), torch.no_grad():
        return f"{float(loss(model, next(iter(each_batch(batches))))):.3e}"


def _exact(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Loss | None,
    memory_budget: int | None,
    device: torch.device | str | None,
) -> dict[str, ExactGradient]:
    found: dict[str, ExactGradient] = {}
    groups = list(groups_within(layers, memory_budget))
    home = torch.device("cpu") if len(groups) > 1 else device
    for part in exact_in_groups(model, groups, batches, loss, device):
        found |= {name: ExactGradient(each.matrix.to(home)) for name, each in part.items()}
    return found


def choose_method(
    method: str, layers: Mapping[str, nn.Module], memory_budget: int | None, *, whole: bool = False
) -> Literal["exact", "sketch"]:
    """What "auto" stands for, with a line in the log that says why.

    Args:
        whole: G itself is needed, not its leading directions only.

    Raises:
        EvidenceError: no such method, or a sketch where G itself is needed.
    """
    if method not in GRADIENT_METHODS:
        raise EvidenceError(
            f"method must be one of {', '.join(GRADIENT_METHODS)}, found {method!r}{nearest(method, GRADIENT_METHODS)}"
        )
    if whole and method == "sketch":
        raise EvidenceError(
            "this start needs the gradients themselves: expected method 'exact' or 'auto', not 'sketch'"
        )
    if method == "exact":
        return "exact"
    if method == "sketch":
        return "sketch"
    needed = sum(gradient_bytes(layer) for layer in layers.values())
    budget = AUTO_BUDGET if memory_budget is None else memory_budget
    sizes = f"{needed / 2**30:.2f} GiB for {len(layers)} layers, the budget is {budget / 2**30:.2f} GiB"
    if whole:
        log.info("gradients: exact, as the start needs them whole (%s)", sizes)
        return "exact"
    chosen: Literal["exact", "sketch"] = "exact" if needed <= budget else "sketch"
    log.info("gradients: %s, as the exact ones take %s", chosen, sizes)
    return chosen


def exact_in_groups(
    model: nn.Module,
    groups: Iterable[Mapping[str, nn.Module]],
    batches: Iterable[Any],
    loss: Loss | None,
    device: torch.device | str | None = None,
) -> Iterator[dict[str, ExactGradient]]:
    """The exact gradients of one group of layers after the other, each from a pass over the same batches."""
    groups = list(groups)
    batches = repeatable(batches, len(groups))
    for group in groups:
        yield exact_gradients(model, group, batches, loss, device=device)


def sketch_with_warning(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    widths: Mapping[str, int],
    loss: Loss | None,
    *,
    passes: int = 1,
) -> dict[str, SketchedGradient]:
    """Sketched gradients, with a warning that names the layers where they hold little of the energy."""
    found = sketched_gradients(model, layers, batches, widths, loss, passes=passes)
    low = {name: each.captured for name, each in found.items() if each.captured < LOW_ENERGY}
    if low:
        worst = min(low, key=low.__getitem__)
        log.warning(
            "gradients: in %d of %d layers the sketch holds less than %.0f %% of the gradient's energy (least in %s, "
            "%.0f %%): a higher rank would capture more of the first step there",
            *(len(low), len(found), 100 * LOW_ENERGY, worst, 100 * low[worst]),
        )
    return found
