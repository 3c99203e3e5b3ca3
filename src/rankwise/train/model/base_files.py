"""What a base model's files ask of transformers, looked at before transformers does as they ask.

transformers puts an adapter that lies in a base's directory on the model, opens what an index of weights names, and
fetches the kernels that a configuration names. A base may be a stranger's: an adapter's configuration can name it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rankwise.errors import BrokenFile, PretrainedError, UnsafeFile
from rankwise.files import read_small
from rankwise.json_object import as_object

_INDEX = "model.safetensors.index.json"
_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_base(source: str | Path) -> None:
    """Refuse a base that would be more than safetensors and JSON, or other than its own files.

    Args:
        source: a directory or a hub name. Of what is in neither, transformers will say that it is not there.

    Raises:
        PretrainedError: an adapter lies in it. BrokenFile: its configuration or index is malformed.
        UnsafeFile: its weights are to come from pickles or other directories, or its code from the hub.
    """
    if (adapter := _path(source, "adapter_config.json")) is not None:
        raise PretrainedError(
            f"{source}: expected a pretrained model, found an adapter ({adapter.name}), which transformers would put "
            "on it. Load the model without that file, then an adapter with rankwise.load(model, path)."
        )
    config = _object(source, "config.json")
    _check_no_code(source, config)
    weights = config.get("transformers_weights")
    if weights is not None:
        _check_weights(f"{source}: config.json: transformers_weights", weights, (".safetensors", ".index.json"))
    index = weights if isinstance(weights, str) and weights.endswith(".json") else _INDEX
    shards = _object(source, index).get("weight_map", {})
    if not isinstance(shards, dict):
        raise BrokenFile(f"{source}: {index}: weight_map is {shards!r:.80}; expected tensor name → file")
    for shard in dict.fromkeys(map(str, shards.values())):
        _check_weights(f"{source}: {index}", shard, (".safetensors",))
        if isinstance(source, Path) and not (source / shard).is_file():
            raise BrokenFile(f"{source / shard}: no such file; expected the weights that {index} names")


def _check_no_code(source: str | Path, config: Any) -> None:
    """Kernels are named as ``owner/repository``, at the top of a configuration or of one that it holds."""
    for name, value in config.items():
        if name in _CODE and "/" in json.dumps(value):
            raise UnsafeFile(
                f"{source}: config.json: {name} is {value!r}, code that would be fetched from the hub and run; none is "
                "run here: remove it"
            )
        if isinstance(value, dict):
            _check_no_code(source, value)


def _check_weights(place: str, name: Any, endings: tuple[str, ...]) -> None:
    if not isinstance(name, str) or not name.endswith(endings) or Path(name).name != name or "\\" in name:
        raise UnsafeFile(
            f"{place} names {name!r}; expected a safetensors file beside it: nothing else is opened, since a pickle "
            "can run code. Convert the model to safetensors in an environment that you trust"
        )


def _object(source: str | Path, name: str) -> dict[str, Any]:
    path = _path(source, name)
    return {} if path is None else as_object(str(path), read_small(path))


def _path(source: str | Path, name: str) -> Path | None:
    """A base's file, which the hub's cache may have to fetch first; None where there is none."""
    if isinstance(source, Path):
        return source / name if (source / name).is_file() else None
    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such model: transformers says so, with what it tried
        return None
    return None if found is None else Path(found)
