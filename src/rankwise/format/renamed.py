"""Modules that a release of transformers renamed: a file written before has their old names.

transformers keeps a table of what it renamed, for its own checkpoints; PEFT reads adapters by it.
"""

import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from rankwise.adapter import Adapter
from rankwise.sites import base_modules

log = logging.getLogger("rankwise")
T = TypeVar("T")


def with_present_names(model: nn.Module, adapter: Adapter, source: Path) -> Adapter:
    """The adapter with its modules named as they are in the model now, where transformers' table leads there.

    Args:
        source: the file, for the log.
    """
    paths = {*adapter.sites, *(name.rpartition(".")[0] for name in adapter.saved), *adapter.base_probe}
    names = _present_names(model, paths)
    if not names:
        return adapter
    old = min(names)
    count, new = len(names), names[old]
    log.warning("%s: %d modules have other names in this transformers, such as %s → %s", source, count, old, new)

    def renamed(values: Mapping[str, T]) -> dict[str, T]:
        return {names.get(path, path): value for path, value in values.items()}

    saved = {}
    for name, tensor in adapter.saved.items():
        path, _, last = name.rpartition(".")
        saved[f"{names.get(path, path)}.{last}"] = tensor
    return replace(adapter, sites=renamed(adapter.sites), saved=saved, base_probe=renamed(adapter.base_probe))


def _present_names(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Old path → present path, of modules that the model has under another name only."""
    table: Any = sys.modules.get("transformers.conversion_mapping")  # there if the model is one of transformers'
    loading: Any = sys.modules.get("transformers.core_model_loading")
    modules = base_modules(model)
    absent = [path for path in paths if path not in modules]
    if not absent or table is None:
        return {}
    renamings = [rule for rule in table.get_model_conversion_mapping(model) if isinstance(rule, loading.WeightRenaming)]
    keys = {path: loading.rename_source_key(f"{path}.weight", renamings, [])[0] for path in absent}
    names = {path: key.removesuffix(".weight") for path, key in keys.items()}
    return {old: new for old, new in names.items() if new in modules}
