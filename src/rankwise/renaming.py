"""renamed: an adapter under a model's other module names, after a library moved its modules."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from rankwise.adapter import Adapter
from rankwise.errors import SpecError

T = TypeVar("T")


def renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The same adapter for a model whose modules have other paths.

    Args:
        names: regular expression → what stands in the place of its first match, as in transformers'
            ``_checkpoint_conversion_mapping``; of several that match a path, the first counts.

    Raises:
        SpecError: two sites would get one name, or none another one.

    >>> import torch, rankwise as rw
    >>> from rankwise.adapter import SiteAdapter
    >>> site = SiteAdapter("linear", rw.LowRank(torch.ones(2, 1), torch.ones(1, 2)))
    >>> old = Adapter(rw.LoRA(rank=1), {"language_model.model.q_proj": site}, ("q_proj",))
    >>> list(renamed(old, {r"^language_model\\.model": "model.language_model"}).sites)
    ['model.language_model.q_proj']
    """
    sites = _renamed_keys(adapter.sites, names)
    if len(sites) < len(adapter.sites):
        raise SpecError(f"renamed: {names} gives one name to several of the adapter's sites; expected one for each")
    if sites.keys() == adapter.sites.keys():
        raise SpecError(f"renamed: {names} matches none of the adapter's sites, such as {min(sites)}")
    targets = "|".join(re.escape(path) for path in sorted(sites))
    return replace(
        adapter,
        spec=replace(adapter.spec, target_modules=targets),
        sites=sites,
        targets=targets,
        base_probe=_renamed_keys(adapter.base_probe, names),
        saved=_renamed_keys(adapter.saved, names),
    )


def _renamed_keys(content: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    return {_renamed(key, names): value for key, value in content.items()}


def _renamed(path: str, names: Mapping[str, str]) -> str:
    for expression, place in names.items():
        changed, count = re.subn(expression, place, path, count=1)
        if count:
            return changed
    return path
