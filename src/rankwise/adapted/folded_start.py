"""anchor="fold": a start that the base weights take in, so that they hold W₀ − sB₀A₀ while the adapter is on."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from rankwise.adapted.adapted import Adapted
from rankwise.algebra.low_rank import LowRank
from rankwise.errors import AttachError
from rankwise.foldable import parameter_owners, why_not_writable
from rankwise.layers.kinds import base_matrix
from rankwise.sites import Site
from rankwise.variants.base import AdapterLayer, FoldableLayer

log = logging.getLogger("rankwise")


def check_foldable(model: nn.Module, sites: Iterable[Site]) -> None:
    """Refuse sites whose weights cannot take a start in.

    Raises:
        AttachError: the model carries an adapter, or a weight is quantised or tied.
    """
    if Adapted.find(model) is not None:
        raise AttachError(
            "anchor='fold' changes the base weights, so it must be the model's only adapter; detach first"
        )
    owners = parameter_owners(model)
    for site in sites:
        if reason := why_not_writable(model.get_submodule(site.name), owners):
            raise AttachError(f"{site.name}: {reason}, or use anchor='frozen'")


@torch.no_grad()
def fold_starts(adapted: Adapted, adapter_layers: Mapping[str, AdapterLayer]) -> None:
    """Put W₀ − sB₀A₀ in the place of W₀ and report what rounding cost."""
    worst = 0.0
    for path, adapter_layer in adapter_layers.items():
        start = adapter_layer.start_to_fold() if isinstance(adapter_layer, FoldableLayer) else None
        if start is None:
            continue
        layer, kind = adapted.layer(path), adapter_layer.kind
        base = base_matrix(layer)
        rounded = kind.stored(layer, base - start.dense()).to(layer.weight.dtype).contiguous()
        adapted.folded[path] = adapted.swap_weight(path, rounded)
        exact = LowRank(start.B.double(), start.A.double(), start.scale).dense()
        error = kind.weight(layer).double() + exact - base
        worst = max(worst, float(error.norm() / base.norm()))
    log.warning("anchor='fold': rounding W₀ − sB₀A₀ moved the start by up to %.1e of ‖W₀‖ a layer", worst)
