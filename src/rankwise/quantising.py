"""merge_quantised: fold the active adapters into weights that will be stored in few bits, each rounded once."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted
from rankwise.adapted.merge import MergeReport, merge, mergeable
from rankwise.algebra.precision import at_least_fp32
from rankwise.errors import MergeError
from rankwise.evidence.activations import Forward, InputCovariance, input_covariances
from rankwise.foldable import parameter_owners, why_not_writable
from rankwise.grids import GRIDS, Grid
from rankwise.layers.kinds import kind_of
from rankwise.methods import row
from rankwise.planning import target_layers
from rankwise.shapes import Float
from rankwise.text_table import aligned

_HELD = 2**28  # numbers of covariances in memory at a time
_DAMPING = 0.01  # of the mean of C's diagonal, as in GPTQ
_BLOCK = 128  # columns whose errors are pushed on together


@dataclass(frozen=True)
class SiteRounding:
    """What storing one layer in few bits did. W = W₀ + ΔW, W' what a reader of the stored weight has.

    Attributes:
        change: ‖ΔW‖ / ‖W₀‖; 0 where no adapter is.
        error: ‖W' − W‖ / ‖W‖.
        output_error: √(Σ‖(W' − W)x‖² / Σ‖W x‖²) on the inputs that were given; None without any.
    """

    change: float
    error: float
    output_error: float | None


@dataclass(frozen=True)
class QuantisedMerge:
    """Layer → what rounding did there; prints as a table.

    Attributes:
        to: the kind of storage.
        sites: the layers that are stored so.
        others: the adapted layers that are not (embeddings, heads, convolutions), folded in their own precision.
    """

    to: str
    sites: Mapping[str, SiteRounding]
    others: MergeReport

    def __str__(self) -> str:
        rows = [("layer", "change", "error", "of outputs")]
        rows += [(path, f"{site.change:.2%}", f"{site.error:.2%}", _share(site)) for path, site in self.sites.items()]
        return aligned(rows, left=1)


def _share(site: SiteRounding) -> str:
    return "" if site.output_error is None else f"{site.output_error:.2%}"


@torch.inference_mode(False)
@torch.no_grad()
def merge_quantised(
    model: nn.Module, to: str = "nf4", *, batches: Iterable[Any] | None = None, forward: Forward | None = None
) -> QuantisedMerge:
    """Fold the active adapters in, and put every linear layer but the output head on the grid of a storage in few bits.

    W₀ + ΔW is formed in fp32 and rounded once. Each group's scale is its own or a smaller one, whichever loses less.
    Given batches, C = E[x xᵀ] of each layer's inputs says what is lost: tr(E C Eᵀ) of the outputs for an error
    E = W' − W. Columns are then rounded one after the other, and what a column lost is made up for by those to come
    (GPTQ: Frantar 2022, arXiv 2210.17323), the adapter's part of them included; where that does not lose less on the
    inputs than rounding to the nearest, the nearest is taken.

    The model keeps plain weights in its own dtype, on the grid: they are what the storage's reader will have, and
    reading them gives the same codes bit for bit. The adapters are gone, and the pretrained weights too.

    Args:
        to: a name from ``rankwise.grids.GRIDS``.
        batches: dicts for ``model(**batch)``, or anything that ``forward(model, batch)`` takes; they are gone through
            once for every 2²⁸ numbers of covariances. Some thousand tokens of what the model is for do.

    Raises:
        MergeError: no adapter is active, a layer's rows do not fall into groups, a weight is quantised already or
            shared, or not finite. SpecError: an unknown storage. EvidenceError: no batches.
        AttachError: no adapter, or the model is offloaded. The model is then left as it was.
    """
    grid, (adapted, changes) = row(GRIDS, to, "storage"), mergeable(model)
    layers = target_layers(adapted.root)
    _check_layers(adapted.root, layers, grid)
    given = None if batches is None else list(batches)
    weights: dict[str, Tensor] = {}
    sites: dict[str, SiteRounding] = {}
    for part in _parts(layers):
        inputs = {} if given is None else input_covariances(adapted.root, part, given, forward)
        for path, layer in part.items():
            base = _pretrained(adapted, path, layer)
            change = sum((adapter.change(base) for adapter in changes.get(path, ())), torch.zeros_like(base))
            weights[path], sites[path] = _stored(path, layer, grid, base, change, inputs.get(path))
    folded = merge(model, keep_base=False, most_lost=1.0)
    for path, weight in weights.items():
        layers[path].get_parameter("weight").data = weight
    others = MergeReport({path: site for path, site in folded.sites.items() if path not in sites})
    return QuantisedMerge(to, sites, others)


def _check_layers(model: nn.Module, layers: Mapping[str, nn.Module], grid: Grid) -> None:
    owners = parameter_owners(model)
    for path, layer in layers.items():
        if reason := why_not_writable(layer, owners):
            raise MergeError(f"{path}: {reason}, then merge")
        grid.check(path, kind_of(layer).shape(layer)[1])


def _parts(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The layers, as many at a time as there is room for covariances of; one at least."""
    part: dict[str, nn.Module] = {}
    held = 0
    for path, layer in layers.items():
        numbers = kind_of(layer).shape(layer)[1] ** 2
        if part and held + numbers > _HELD:
            yield part
            part, held = {}, 0
        part[path] = layer
        held += numbers
    yield part


def _pretrained(adapted: Adapted, path: str, layer: Any) -> Float[Tensor, "out in"]:
    """W₀, in fp32 or finer; an anchor that is folded into the layer's weight is not part of it."""
    return at_least_fp32(kind_of(layer).matrix(layer, adapted.folded.get(path, layer.weight.data).to(layer.weight)))


def _stored(
    path: str,
    layer: Any,
    grid: Grid,
    base: Float[Tensor, "out in"],
    change: Float[Tensor, "out in"],
    inputs: InputCovariance | None,
) -> tuple[Tensor, SiteRounding]:
    """The weight on the grid, in the layer's layout and dtype, and what is lost by it."""
    weight = base + change
    if not bool(torch.isfinite(weight).all()):
        raise MergeError(f"{path}: the sum of weight and change holds NaN or infinity; expected finite numbers")
    C = None if inputs is None else inputs.matrix.to(weight)
    dtype = layer.weight.dtype
    stored = grid.read(rounded(weight, grid, C).to(dtype)).to(dtype)
    error = grid.read(stored) - weight
    outputs = None if C is None else math.sqrt(_ratio(_energy(error, C), _energy(weight, C)))
    site = SiteRounding(_relative(change, base), _relative(error, weight), outputs)
    return kind_of(layer).stored(layer, stored).contiguous(), site


def _relative(part: Tensor, whole: Tensor) -> float:
    return _ratio(float(torch.linalg.vector_norm(part)), float(torch.linalg.vector_norm(whole)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0 if part == 0.0 else math.inf


def _energy(matrix: Float[Tensor, "out in"], C: Float[Tensor, "in in"]) -> float:
    """tr(M C Mᵀ) = E‖M x‖²."""
    return float(((matrix @ C) * matrix).sum(dtype=torch.float64))


def rounded(
    weight: Float[Tensor, "out in"], grid: Grid, C: Float[Tensor, "in in"] | None = None
) -> Float[Tensor, "out in"]:
    """A weight on the grid: the nearest, or, given the inputs' second moment, whichever loses less of the outputs."""
    groups = grid.grouped(weight)
    importance = None if C is None else grid.grouped(C.diagonal().expand_as(weight))
    scales = grid.clipped_scales(groups, importance)
    nearest = _whole(grid.rounded(groups, scales), weight)
    if C is None or not bool(C.any()):
        return nearest
    pushed = _compensated(weight, grid, groups, scales, C)
    return min(nearest, pushed, key=lambda kept: _energy(kept - weight, C))


def _whole(groups: Float[Tensor, "n g"], like: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    return groups.flatten()[: like.numel()].view_as(like)


def _compensated(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    groups: Float[Tensor, "n g"],
    scales: Float[Tensor, "n 1"],
    C: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """GPTQ with scales that are fixed beforehand, columns by falling E[x_j²].

    With C⁻¹ = UᵀU, U upper triangular, the error e = (w_j − q_j)/U_jj of column j is made up for by w_k −= e U_jk,
    k > j. The number that a group has its scale from stays on the outermost level, so that the scale is read again.
    """
    order = C.diagonal().argsort(descending=True)
    U = _inverse_factor(C[order][:, order])
    each = _whole(scales.expand_as(groups), weight)[:, order]
    fixed = _whole(_outermost(grid, groups, scales), weight)[:, order]
    left, kept = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        errors = torch.zeros_like(left[:, block])
        for j in range(start, min(start + _BLOCK, weight.shape[1])):
            nearest = grid.rounded(left[:, j : j + 1], each[:, j : j + 1])[:, 0]
            kept[:, j] = torch.where(fixed[:, j] != 0, fixed[:, j], nearest)
            error = (left[:, j] - kept[:, j]) / U[j, j]
            left[:, j : block.stop] -= error[:, None] * U[j, j : block.stop]
            errors[:, j - start] = error
        left[:, block.stop :] -= errors @ U[block, block.stop :]
    return kept[:, order.argsort()]


def _inverse_factor(C: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Upper triangular U with (C + damping)⁻¹ = UᵀU, in C's type, computed in fp64."""
    damped = C.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(C)


def _outermost(grid: Grid, groups: Float[Tensor, "n g"], scales: Float[Tensor, "n 1"]) -> Float[Tensor, "n g"]:
    """The outermost value of each group at the number that the group has its own scale from; 0 elsewhere."""
    upper, lower = groups / grid.levels[-1], groups / grid.levels[0]
    place = torch.maximum(upper, lower).argmax(1, keepdim=True)
    level = torch.where(groups.gather(1, place) < 0, grid.levels[0], grid.levels[-1])
    return torch.zeros_like(groups).scatter_(1, place, level * scales)
