"""merge: fold the active adapters into the base weights, in fp32, and say what survived rounding."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted, forget_compiled
from rankwise.algebra.precision import at_least_fp32
from rankwise.errors import MergeError
from rankwise.foldable import parameter_owners, why_not_writable
from rankwise.placement import check_in_memory
from rankwise.shapes import Float, Shaped
from rankwise.token_rows import TiedRows
from rankwise.variants.base import WeightChange


@dataclass(frozen=True)
class SiteMerge:
    """What folding did at one site.

    Attributes:
        change: ‖ΔW‖_F in fp32.
        relative_change: ‖ΔW‖_F / ‖W₀‖_F.
        lost: ‖(W' − W₀) − ΔW‖_F / ‖ΔW‖_F, the share of the change that rounding to the weight's dtype swallowed.
    """

    change: float
    relative_change: float
    lost: float


@dataclass(frozen=True)
class MergeReport:
    """Site name → what folding did there; prints as a summary."""

    sites: Mapping[str, SiteMerge]

    @property
    def lost(self) -> float:
        """Share of the whole change that rounding swallowed: ‖errors‖ / ‖changes‖ over all sites."""
        change = math.hypot(*(site.change for site in self.sites.values()))
        return math.hypot(*(site.lost * site.change for site in self.sites.values())) / change if change else 0.0

    @property
    def worst(self) -> str:
        """The site that lost the largest share of its change."""
        return max(self.sites, key=lambda name: self.sites[name].lost)

    def __str__(self) -> str:
        losses = sorted(site.lost for site in self.sites.values())
        return (
            f"merged {len(self.sites)} sites; rounding lost {self.lost:.2%} of the change, "
            f"{losses[len(losses) // 2]:.2%} at the median site, {losses[-1]:.2%} at the worst ({self.worst})"
        )


# Past it more than half of the change's energy is gone, and the merged weights are nearer to the pretrained ones than
# to the trained. Measured on SmolLM2-135M in bf16: where 23 % of the change was lost, the logits were off by 9 % of
# what the adapter had moved them; at 59 % lost by 26 %, at 84 % by 60 %, at 95 % by more than all of it.
MOST_LOST = 0.7


@torch.inference_mode(False)
@torch.no_grad()
def merge(model: nn.Module, *, keep_base: bool = True, most_lost: float = MOST_LOST) -> MergeReport:
    """Fold the active adapters into the base: the model is plain again, with no cost left at inference.

    Args:
        keep_base: hold on to the pretrained weights, so that ``unmerge`` or ``detach`` restore them bit for bit. False
            frees them and forgets the adapters.
        most_lost: the largest share of the whole change (:attr:`MergeReport.lost`) that rounding may swallow; 1 and
            more accepts any. Of the whole change and not of each site's: where a layer's change is far below rounding,
            so is what losing it costs.

    Raises:
        MergeError: NaN or infinity in a base weight, a change or a folded weight, a quantised base, a weight that
            another module shares, or more lost than ``most_lost``. The model is then left as it was.
        AttachError: the model carries no adapter, or is offloaded.
    """
    if not most_lost >= 0:  # nor NaN
        raise MergeError(f"most_lost: expected a share from 0 on, found {most_lost}")
    adapted, changes = mergeable(model)
    forget_compiled()
    folded = {path: _fold(adapted, path, layers) for path, layers in changes.items()}
    report = MergeReport({path: site for path, (_, site) in folded.items()})
    _check_lost(adapted, report, most_lost)
    for path, slot in adapted.slots.items():
        slot.take_off(adapted.layer(path))
    adapted.merged = {path: adapted.swap_weight(path, weight) for path, (weight, _) in folded.items()}
    if not keep_base:
        adapted.uninstall()
    return report


def mergeable(model: nn.Module) -> tuple[Adapted, dict[str, list[WeightChange]]]:
    """The adapted model, and the active adapters' layers at each site, whose changes its weights can take.

    Raises:
        MergeError: none is active, the model is merged already, or a weight cannot be written.
        AttachError: the model carries no adapter, or is offloaded.
    """
    adapted = Adapted.of(model)
    if adapted.merged:
        raise MergeError("this model is merged already: call rankwise.unmerge or rankwise.detach first")
    check_in_memory(adapted.root)
    changes = _active_changes(adapted)
    if not changes:
        raise MergeError("no adapter is active, so there is nothing to merge: call rankwise.activate(model, name)")
    _check_unshared(adapted, changes)
    return adapted, changes


def _active_changes(adapted: Adapted) -> dict[str, list[WeightChange]]:
    """Site name → the active adapters' layers there, which must all be changes of the weight."""
    changes: dict[str, list[WeightChange]] = {}
    for path, slot in adapted.slots.items() if adapted.enabled else ():
        for name in slot.active:
            layer = slot.adapters[name]
            if isinstance(layer, TiedRows):  # its weight is the one that its embedding's rows go into
                continue
            if not isinstance(layer, WeightChange):
                raise MergeError(
                    f"{path}: adapter {name!r} is a {type(layer).__name__}, which is not linear, so no weight can hold "
                    f"it; activate only adapters that change the weight, then merge"
                )
            changes.setdefault(path, []).append(layer)
    return changes


def _check_lost(adapted: Adapted, report: MergeReport, most_lost: float) -> None:
    if most_lost < 1.0 and report.lost > most_lost:
        dtype = adapted.layer(report.worst).weight.dtype
        raise MergeError(
            f"rounding to {dtype} would lose {report.lost:.0%} of the change ({report.worst}: "
            f"{report.sites[report.worst].lost:.0%}); expected at most {most_lost:.0%}: load the base in fp32 and "
            f"merge there, keep the adapter apart, or accept it with most_lost=1.0"
        )


def _check_unshared(adapted: Adapted, paths: Iterable[str]) -> None:
    following = {f"{path}.weight" for path, slot in adapted.slots.items() if slot.follows}
    shared = parameter_owners(adapted.root).items()
    owners = {key: [name for name in names if name not in following] for key, names in shared}
    for path in paths:
        if reason := why_not_writable(adapted.layer(path), owners):
            raise MergeError(f"{path}: {reason}, then merge")


_CHUNK = 2**16  # numbers of a weight that are folded at a time: small enough for a core's own cache


def _fold(adapted: Adapted, path: str, adapters: Sequence[WeightChange]) -> tuple[Tensor, SiteMerge]:
    """The folded weight in the layer's layout and dtype, and what rounding did to it."""
    layer, kind = adapted.layer(path), adapters[0].kind
    stored = adapted.folded.get(path, layer.weight.data).to(layer.weight)
    folded = torch.empty_like(stored, memory_format=torch.contiguous_format)
    before, after = kind.matrix(layer, stored), kind.matrix(layer, folded)
    squares = torch.zeros(3, dtype=torch.float64)
    step = max(_CHUNK // before.shape[1], 1)
    for first in range(0, before.shape[0], step):
        rows = slice(first, first + step)
        squares += _fold_rows(before[rows], after[rows], adapters, rows)
    change, lost, base = squares.sqrt().tolist()
    if not math.isfinite(base):
        raise MergeError(f"{path}: the base weight holds NaN or infinity; expected finite numbers: load it again")
    if not math.isfinite(change):
        raise MergeError(f"{path}: the adapter's change holds NaN or infinity; expected finite numbers")
    if not math.isfinite(lost):
        raise MergeError(
            f"{path}: the sum of weight and change is beyond {stored.dtype}; load the base in bf16 or fp32"
        )
    return folded, SiteMerge(change, change / max(base, 1e-30), lost / change if change else 0.0)


def _fold_rows(
    before: Shaped[Tensor, "n in"], after: Shaped[Tensor, "n in"], adapters: Sequence[WeightChange], rows: slice
) -> Float[Tensor, "3"]:
    """Write some folded rows; returns ‖ΔW‖², ‖(W' − W₀) − ΔW‖² and ‖W₀‖² of them, on the CPU."""
    base = at_least_fp32(before)
    change = adapters[0].change(base, rows)
    for adapter in adapters[1:]:
        change += adapter.change(base, rows)
    torch.add(base, change, out=after) if base.dtype == after.dtype else after.copy_(base + change)
    size = _square(change)
    return torch.stack([size, _square(change.sub_(after).add_(base)), _square(base)]).cpu()


def _square(matrix: Float[Tensor, "n in"]) -> Tensor:
    flat = matrix.flatten()
    return torch.dot(flat, flat).double()


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`: the base weights bit for bit, and the adapters in their slots again.

    Raises:
        MergeError: the model is not merged. AttachError: it carries no adapter.
    """
    adapted = Adapted.of(model)
    if not adapted.merged:
        raise MergeError("this model is not merged")
    forget_compiled()
    for path, weight in adapted.merged.items():
        adapted.swap_weight(path, weight)
    for path, slot in adapted.slots.items():
        layer = adapted.layer(path)
        slot.to(layer.weight.device).put_on(layer)
    adapted.merged.clear()
    return model
