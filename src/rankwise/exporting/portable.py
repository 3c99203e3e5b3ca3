"""The portable profile: an adapter as every reader of PEFT's directories computes it alike."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.adapter import Adapter, SiteAdapter, targets_among
from rankwise.algebra.low_rank import LowRank
from rankwise.layers.kinds import Kind, kind_or_none
from rankwise.sites import base_modules

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels


def portable_profile(adapter: Adapter) -> Adapter:
    """The same changes with scales folded into B, and zeros that bring all sites to one rank r; alpha = r.

    So s = 1 is what ``alpha / r`` makes, whoever computes it, and no pattern, rsLoRA or regular expression is needed.
    DoRA's magnitudes stay as they are, since ΔW does.

    >>> import rankwise as rw
    >>> site = SiteAdapter("linear", LowRank(torch.ones(3, 2), torch.ones(2, 4), scale=0.5))
    >>> profile = portable_profile(Adapter(rw.LoRA(rank=2, scaling="rslora"), {"proj": site}, ("proj",)))
    >>> delta = profile.sites["proj"].delta
    >>> delta.rank, delta.scale, torch.equal(delta.dense(), site.delta.dense())
    (8, 1.0, True)
    """
    rank = common_rank(adapter)
    sites = {path: replace(site, delta=padded(site.delta, rank // site.groups)) for path, site in adapter.sites.items()}
    spec = replace(adapter.spec, rank=rank, alpha=rank, scaling="lora", rank_pattern={}, alpha_pattern={})
    targets = adapter.targets
    if isinstance(targets, str) and targets != "all-linear":
        targets = tuple(sites)
    return replace(adapter, spec=spec, sites=sites, targets=targets)


def common_rank(adapter: Adapter) -> int:
    """The rank of all sites in the file: one of ``RANKS`` where that is possible.

    A grouped convolution's A stands in the file once for each group, so the groups must divide it.
    """
    needed = max(site.delta.rank * site.groups for site in adapter.sites.values())
    step = math.lcm(*(site.groups for site in adapter.sites.values()))
    return next((rank for rank in RANKS if rank >= needed and rank % step == 0), -(-needed // step) * step)


def padded(delta: LowRank, rank: int) -> LowRank:
    """The same matrix with scale 1 and ``rank`` columns of B."""
    more = rank - delta.rank
    return LowRank(F.pad(delta.B * delta.scale, (0, more)), F.pad(delta.A, (0, 0, 0, more)))


def with_zero_pairs(adapter: Adapter, base: nn.Module, needs: Mapping[str, tuple[str, ...]]) -> Adapter:
    """The adapter with pairs of zeros on further layers, where an engine takes them for granted.

    Args:
        needs: last part of a site's name → those of the layers beside it that must have a pair as well.
    """
    layers = {path: (module, kind) for path, module in base_modules(base).items() if (kind := kind_or_none(module))}
    zeros: dict[str, SiteAdapter] = {}
    for path in adapter.sites:
        name = path.rpartition(".")[2]
        beside = [f"{path.removesuffix(name)}{other}" for other in needs.get(name, ())]
        zeros |= {
            other: _zero_pair(*layers[other]) for other in beside if other in layers.keys() - adapter.sites.keys()
        }
    sites = {**adapter.sites, **zeros}
    return replace(adapter, sites=sites, targets=targets_among(base_modules(base), list(sites)))


def _zero_pair(layer: nn.Module, kind: Kind) -> SiteAdapter:
    out, into = kind.shape(layer)
    zeros: Tensor = torch.zeros(out, 1)
    return SiteAdapter(kind.name, LowRank(zeros, torch.zeros(1, into)))
