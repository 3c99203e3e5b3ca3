"""scan: what in a saved adapter is unlike ordinary adapters, layer by layer, with the base's weights one at a time."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor

from rankwise.adapter import Adapter, SiteAdapter
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.svd import truncated_svd
from rankwise.analysis.change import intruder_dimensions
from rankwise.base_probe import gap, room
from rankwise.base_weights import BaseWeights, Source
from rankwise.errors import BaseMismatch, ShapeMismatch
from rankwise.shapes import Float
from rankwise.sites import site_generator

MARGIN = 2.0  # past the reference's extremes by this factor is what no ordinary adapter is

# Measure → what it is, and what a value past the ordinary suggests. None of them depends on a model's size or scale.
MEASURES = {
    "spectral_size": (
        "‖ΔW‖₂/‖W₀‖₂",
        "it drowns the weight: look at alpha and the learning rate",
    ),
    "relative_size": ("‖ΔW‖_F/‖W₀‖_F", "it replaces the weight: look at alpha and the learning rate"),
    "dominance": ("σ₁²/Σσᵢ² of the other directions", "one direction carries nearly everything: what is its input?"),
    "share": ("share of Σ‖ΔW‖², over that of an even spread", "this layer was changed apart from the others: by hand?"),
    "imbalance": (
        "(‖B‖/‖A‖) over the adapter's median",
        "not trained beside the others: compare its source",
    ),
    "intruders": (
        "of W₀ + ΔW's 10 leading directions, those unlike all of W₀'s",
        "the model may forget: lower the rate",
    ),
    "magnitude": (
        "largest |ln(m/‖W₀‖)| of DoRA's lengths",
        "lengths not from training: compare its source",
    ),
}
_LEAST_RANK = 4  # from which on one direction of many can be said to stand out
_LEADING = 10  # directions in which intruders are looked for
_PROBES, _DIRECTIONS = 64, 4  # random directions, and the adapter's own, that a weight's response is compared on
_UNRELATED = 2.0  # below it, an adapter's directions are to the base as random ones are; those give 1
_LEAST_SITES = 12  # that are needed to say so


@dataclass(frozen=True)
class Finding:
    """Something that stands out.

    Attributes:
        site: the layer; "" for the whole adapter.
        what: the measure, or a word for the fault.
        why: what was measured, beside what is ordinary.
        advice: what to do.
    """

    site: str
    what: str
    why: str
    advice: str


@dataclass(frozen=True)
class Scan:
    """What :func:`scan` found.

    Attributes:
        sites: layer → measure (of ``MEASURES``) → value.
        fit: root mean square, over layers and both sides, of how far ‖W₀v‖² along the adapter's leading directions lies
            from that along random ones, in their standard deviations; about 1 on a base that has nothing to do with the
            adapter. None without a base.
        findings: what stands out, the whole adapter's first.
    """

    sites: Mapping[str, Mapping[str, float]]
    fit: float | None
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@cache
def ordinary() -> dict[str, list[float]]:
    """Measure → its lowest and highest value over ordinary adapters (benchmarks/ordinary_adapters.py)."""
    text = files("rankwise.analysis").joinpath("ordinary.json").read_text(encoding="utf-8")
    bounds: dict[str, list[float]] = json.loads(text)["bounds"]
    return bounds


@torch.no_grad()
def scan(adapter: Adapter, base: Source | None = None, *, seed: int = 0) -> Scan:
    """Look for what ordinary adapters do not have: another base, dead or equal sites, sizes and spectra out of range.

    Args:
        base: the base model, its tensors by name, or its safetensors file or directory, of which one weight at a time
            is read. Without it, what is measured against the base's weights is left out.
        seed: of the random directions and the randomised decompositions.
    """
    measured: dict[str, dict[str, float]] = {}
    findings: list[Finding] = []
    responses: list[float] = []
    weights = None if base is None else BaseWeights(base)
    for path, site in adapter.sites.items():
        if not _is_finite(site):
            measured[path] = {}
            findings.append(Finding(path, "not finite", "its tensors hold NaN or infinity", "the run diverged"))
            continue
        measured[path] = _alone(site)
        weight = None if weights is None else _weight(weights, path, site, findings)
        if weight is not None and measured[path]:
            generator = site_generator(seed, path)
            measured[path] |= _against(site, weight, generator)
            responses += _responses(site.delta, weight, generator)
    _relate(measured)
    fit = math.sqrt(sum(z * z for z in responses) / len(responses)) if responses else None
    findings = [*_of_base(adapter, weights, fit, len(responses) // 2), *findings, *_same(adapter), *_dead(adapter)]
    findings += [finding for path, values in measured.items() for finding in _outliers(path, values)]
    return Scan(measured, fit, tuple(findings))


def _is_finite(site: SiteAdapter) -> bool:
    tensors = (site.delta.B, site.delta.A, *site.extra.values())
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _alone(site: SiteAdapter) -> dict[str, float]:
    """What the pair says by itself; nothing of one that changes nothing."""
    S = site.delta.svd()[1].double()
    energy = float(S.square().sum())
    if energy == 0.0:
        return {}
    values = {"share": energy, "imbalance": float(site.delta.B.double().norm() / site.delta.A.double().norm())}
    if site.delta.rank >= _LEAST_RANK:
        values["dominance"] = _ratio(float(S[0].square()), float(S[1:].square().sum()))
    return values


def _relate(measured: Mapping[str, dict[str, float]]) -> None:
    """Turn what depends on the adapter's own size into ratios to its other layers."""
    alive = [values for values in measured.values() if values]
    if not alive:
        return
    energy = sum(values["share"] for values in alive)
    middle = median(values["imbalance"] for values in alive)
    for values in alive:
        values["share"] *= len(alive) / energy
        values["imbalance"] /= middle


def _weight(
    weights: BaseWeights, path: str, site: SiteAdapter, findings: list[Finding]
) -> Float[Tensor, "out in"] | None:
    try:
        weight = weights.matrix(path, site)
    except (BaseMismatch, ShapeMismatch) as error:
        findings.append(Finding(path, "base", str(error), "name the base that it was made for with --base"))
        return None
    if bool(torch.isfinite(weight).all()):
        return weight
    findings.append(Finding(path, "base", "the base's weight holds NaN or infinity", "fetch the base again"))
    return None


def _against(site: SiteAdapter, weight: Float[Tensor, "out in"], generator: Generator) -> dict[str, float]:
    delta = LowRank(site.delta.B.to(weight), site.delta.A.to(weight), site.delta.scale)
    largest = float(truncated_svd(weight, 1, generator)[1][0])
    values = {
        "spectral_size": _ratio(float(delta.svd()[1][0]), largest),
        "relative_size": _ratio(float(delta.norm()), float(weight.norm())),
        "intruders": float(intruder_dimensions(delta, weight, min(_LEADING, *weight.shape))),
    }
    lengths = site.extra.get("lora_magnitude_vector")
    if lengths is not None and lengths.numel() == len(weight):
        ratio = lengths.flatten().double() / weight.double().norm(dim=1).clamp_min(1e-30)
        values["magnitude"] = float(ratio.log().abs().nan_to_num(nan=torch.inf).max())  # of negative lengths
    return values


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf


def _responses(delta: LowRank, weight: Float[Tensor, "out in"], generator: Generator) -> list[float]:
    """For inputs and outputs: how far ‖W v‖² along ΔW's leading directions lies from that along random ones, in sd."""
    U, _, V = delta.svd()
    return [_response(weight, V, generator), _response(weight.T, U, generator)]


def _response(weight: Float[Tensor, "n m"], directions: Float[Tensor, "m k"], generator: Generator) -> float:
    random = torch.randn(weight.shape[1], _PROBES, generator=generator).to(weight)
    by_chance = (weight @ (random / random.norm(dim=0))).square().sum(0)
    along = (weight @ directions[:, :_DIRECTIONS].to(weight)).square().sum(0)
    return float((along.mean() - by_chance.mean()) / (by_chance.std() / len(along) ** 0.5).clamp_min(1e-30))


def _of_base(adapter: Adapter, weights: BaseWeights | None, fit: float | None, sites: int) -> Iterator[Finding]:
    """By the probe in the file where there is one, else by how the adapter's directions lie in the weights."""
    if weights is None:
        return
    advice = "name the base that it was made for with --base"
    probes = {path: values for path, values in adapter.base_probe.items() if path in adapter.sites}
    if probes:
        off = {
            path: gap(values, weights.probe(path)) for path, values in probes.items() if _has(weights, path, adapter)
        }
        if off and max(off.values()) > room(adapter.base_quantised):
            worst = max(off, key=lambda path: off[path])
            why = f"{worst}'s weights are off by {off[worst]:.0%} from those that the file has a probe of"
            yield Finding("", "base", why, advice)
    elif fit is not None and sites >= _LEAST_SITES and fit < _UNRELATED:
        why = (
            f"the weights answer to the adapter's directions as to random ones: {fit:.2f} standard deviations apart, "
            f"ordinary from {ordinary()['fit'][0]:.1f} on, random 1"
        )
        yield Finding("", "base", why, advice)


def _has(weights: BaseWeights, path: str, adapter: Adapter) -> bool:
    return path in adapter.sites and _weight(weights, path, adapter.sites[path], []) is not None


def _same(adapter: Adapter) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for path, site in adapter.sites.items():
        pair = b"".join(
            tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in (site.delta.B, site.delta.A)
        )
        first = seen.setdefault(hashlib.sha256(pair).hexdigest(), path)
        if first != path and bool(site.delta.B.any()) and bool(site.delta.A.any()):
            yield Finding(path, "duplicate", f"its pair is {first}'s, number by number", "compare with its source")


def _dead(adapter: Adapter) -> Iterator[Finding]:
    dead = [path for path, site in adapter.sites.items() if not bool(site.delta.B.any() and site.delta.A.any())]
    if dead and len(dead) == len(adapter.sites):
        yield Finding("", "dead", "no layer is changed at all", "it was saved before it was trained")
        return
    for path in dead:
        yield Finding(path, "dead", "its change is zero", "no gradient reached it: leave it out, or look why")


def _outliers(path: str, values: Mapping[str, float]) -> Iterator[Finding]:
    for measure, value in values.items():
        lowest, highest = ordinary()[measure]
        formula, advice = MEASURES[measure]
        bounds = lowest / MARGIN, highest * MARGIN
        if value > bounds[1] or (measure == "imbalance" and value < bounds[0]):
            yield Finding(path, measure, f"{formula} is {value:.3g}; ordinary is {lowest:.2g} to {highest:.2g}", advice)
