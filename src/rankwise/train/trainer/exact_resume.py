"""What decides whether a run can go on exactly where it was: its recipe, data, processes, device and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn

from rankwise.adapter import evenly_spaced
from rankwise.train.recipe import Recipe

# Fields that do not change the steps that are taken. Where the data come from is among them, as it is the tokens that
# are compared; evaluations are, as they draw no random numbers of the run.
_MAY_CHANGE = {
    "data", "data_format", "trained_turns", "max_train_samples", "max_length",
    "answer_metric", "max_new_tokens",
    "eval_data", "eval_split", "max_eval_samples", "per_device_eval_batch_size", "eval_steps",
    "init_memory", "init_cache", "output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to",
    "resume_from_checkpoint", "resume_anyway", "dataloader_num_workers", "alignment_steps", "rate_probe_steps",
    "beside",
}  # fmt: skip
_SAMPLED = 16
_PACKAGES = ("rankwise", "torch", "transformers", "trl", "accelerate")


def facts(recipe: Recipe, data: Dataset, base: str, *, processes: int, device: str) -> dict[str, Any]:
    """What must be equal for a resumed run to be the uninterrupted one, as plain data.

    Args:
        base: the :func:`base_digest` of the model.
    """
    fields = {name: value for name, value in recipe.model_dump(mode="json").items() if name not in _MAY_CHANGE}
    compared = {
        "recipe": fields,
        "training data": f"{len(data)} samples, SHA-256 {fingerprint(data)}",
        "base weights": f"SHA-256 {base}",
        "processes": processes,
        "device": device,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    plain: dict[str, Any] = json.loads(json.dumps(compared))
    return plain


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each fact that differs, those inside objects by their own names."""
    lines = []
    for name in sorted(saved.keys() | now.keys()):
        was, is_now = saved.get(name), now.get(name)
        if name in ("recipe", "versions") and isinstance(was, Mapping) and isinstance(is_now, Mapping):
            lines += differences(was, is_now)
        elif was != is_now:
            lines.append(f"{name}: was {was!r}, is {is_now!r}")
    return lines


def base_digest(model: nn.Module) -> str:
    """SHA-256 over evenly spaced values of each weight: another base is recognised without reading all of it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weight = parameter.data
        if type(weight) is Tensor and weight.numel():  # a quantised kind of its own may not be taken apart
            places = evenly_spaced(_SAMPLED, weight.numel()).to(weight.device)
            digest.update(weight.flatten()[places].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(data: Dataset) -> str:
    """SHA-256 over every value of tokenised data, in order: the same wherever the data come from."""
    digest = hashlib.sha256()
    for name in sorted(data.column_names):
        digest.update(name.encode())
        for batch in data.select_columns(name).with_format("arrow").iter(batch_size=1000):
            digest.update(_content(batch[name].combine_chunks()))
    return digest.hexdigest()


def _content(column: pa.Array) -> bytes:
    """A column's values as bytes; lists of numbers, which tokens are, without making Python objects of them."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type) or column.null_count:
        return json.dumps(column.to_pylist(), default=str).encode()
    lengths, values = pc.list_value_length(column), pc.list_flatten(column)
    return b"".join(array.cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes() for array in (lengths, values))
