"""PEFT's adapter directory: ``adapter_config.json`` + ``adapter_model.safetensors``, from and to an :class:`Adapter`.

A run that started from a pair (A₀, B₀) is written as the plain rank-2r adapter [A; δA], [δB, B₀], exact on the clean
base in every engine, with α chosen so that s is kept.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapter import Adapter, SiteAdapter, one_of_each
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.disk import json_bytes, write_files
from rankwise.errors import SpecError, UnsupportedAdapter
from rankwise.files import read_json, settled
from rankwise.format.configuration import read_extra, read_unlike_peft, relative_start, stated_fields, variant_recorded
from rankwise.format.layout import SiteReader, StoredSite, by_site, named_whole, whole_keys, whole_tensors
from rankwise.format.names import BASE_COPY, CONFIG, EXTRA, FILES, FORMAT_VERSION, PREFIX, TENSORS
from rankwise.format.selection import stated_selection
from rankwise.methods import name_of
from rankwise.scaling import Scaling, declared
from rankwise.spec import LoRA, plain_value
from rankwise.tensor_files import read_tensors, tensor_bytes
from rankwise.variants import VARIANTS
from rankwise.variants.base import PairVariant

log = logging.getLogger("rankwise")


def write_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Write an adapter as a PEFT directory, plus ``rankwise.json`` (its spec, and a probe of its base).

    Raises:
        UnsupportedAdapter: a site has tensors that its variant does not declare, so no reader would know them.
        NonFiniteTensor: the adapter holds NaN or infinity.
        WriteError: the system refuses. What was there is as it was, on each of these errors.
    """
    folder = Path(directory)
    _check_expressible(adapter)
    tensors: dict[str, Tensor] = {}
    for path, site in adapter.sites.items():
        tensors |= {f"{PREFIX}{path}.{suffix}": tensor for suffix, tensor in _wire(site).items()}
    tensors |= {_whole_key(key, adapter.sites): tensor for key, tensor in adapter.saved.items()}
    extra = {
        "format_version": FORMAT_VERSION,
        "spec": adapter.spec.to_dict(),
        "sites": list(adapter.sites),
        "base_probe": {path: list(values) for path, values in adapter.base_probe.items()},
        "base_quantised": adapter.base_quantised,
        "unlike_peft": {path: site.unlike_peft for path, site in adapter.sites.items() if site.unlike_peft},
    }
    contents = {
        TENSORS: tensor_bytes(folder / TENSORS, tensors),
        EXTRA: json_bytes(extra),
        CONFIG: json_bytes(_config(adapter)),
    }
    write_files(folder, contents, last=CONFIG)  # without it a directory is no adapter, to PEFT neither


def _check_expressible(adapter: Adapter) -> None:
    variant = adapter.spec.variant
    assert isinstance(variant, PairVariant)
    for path, site in adapter.sites.items():
        known = variant.tensors if variant.marks else ()
        unknown = sorted(set(site.extra) - set(known))
        if unknown:
            raise UnsupportedAdapter(
                f"{path}: variant {name_of(VARIANTS, variant)!r} gives the file {unknown[0]}, of which no reader would "
                f"know; expected a pair and {', '.join(known) or 'no more'}: name it in the variant's tensors, with "
                f"PEFT's own entry for it in marks, or derive the variant from Variant, which saves its layers' state"
            )


def _wire(site: SiteAdapter) -> dict[str, Tensor]:
    """File suffix → tensor in PEFT's shapes."""
    A, B = site.delta.A, site.delta.B
    if site.kind == "embedding":
        return {"lora_embedding_A": A, "lora_embedding_B": B, **site.extra}
    if site.kind == "conv2d":
        A, B = _conv_A(A, site.kernel, site.groups), B[:, :, None, None]
    return {"lora_A.weight": A, "lora_B.weight": B, **site.extra}


def _whole_key(name: str, sites: Mapping[str, SiteAdapter]) -> str:
    """The file's name for a tensor that is saved whole; of an adapted layer's own weight, PEFT's."""
    path, _, last = name.rpartition(".")
    return f"{PREFIX}{path}.{BASE_COPY}.{last}" if path in sites else f"{PREFIX}{name}"


def _conv_A(A: Tensor, kernel: tuple[int, ...], groups: int) -> Tensor:
    """[r, in/groups·kh·kw] as (groups·r, in, kh, kw): PEFT's lora_A sees all channels, so A stands once per group."""
    filters = A.reshape(-1, *kernel)
    blocks = filters.new_zeros(groups, filters.shape[0], groups, *kernel)
    for group in range(groups):
        blocks[group, :, group] = filters
    return blocks.flatten(2, 3).flatten(0, 1)


def _config(adapter: Adapter) -> dict[str, Any]:
    spec = adapter.spec
    assert isinstance(spec.scaling, Scaling) and isinstance(spec.variant, PairVariant)
    use_rslora = spec.scaling.use_rslora
    ranks = {path: site.delta.rank * site.groups for path, site in adapter.sites.items()}
    alphas = {path: _alpha(declared(use_rslora), site.delta.scale, ranks[path]) for path, site in adapter.sites.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        "exclude_modules": None,
        "lora_dropout": float(spec.dropout),
        "use_rslora": use_rslora,
        "use_dora": False,
        "rank_pattern": {_exactly(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(path): a for path, a in alphas.items() if a != alpha},
        "fan_in_fan_out": all(site.kind == "conv1d" for site in adapter.sites.values()),
        "bias": spec.bias,
        "modules_to_save": list(spec.modules_to_save) or None,
        "trainable_token_indices": plain_value(spec.trainable_token_indices),
        # Never "pissa" or "olora": a loader would redo the decomposition on the base.
        "init_lora_weights": True,
        "inference_mode": True,
        **spec.variant.marks,
    }


def _alpha(formula: Scaling, scale: float, rank: int) -> float | int:
    """The alpha with which the formula that a file declares gives ``scale``; an integer where it is one."""
    alpha = scale / formula(1.0, rank)
    nearest = round(alpha)
    return nearest if nearest and math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _exactly(path: str) -> str:
    """A pattern key that matches this module path and no other."""
    return f"^{re.escape(path)}"


# ---------------------------------------------------------------------------------------------------------- reading


def read_adapter(directory: str | Path) -> Adapter:
    """The adapter in a PEFT directory, whoever wrote it.

    Raises:
        BrokenFile, UnsafeFile: the files are absent, truncated, malformed, a pickle, or lead out of the directory.
        UnsupportedAdapter: not LoRA, with parts that are not read here, or a change of another base than its own.
        SpecError: rank or alpha that is not a positive number.
        MissingTensor, UnexpectedTensor, ShapeMismatch, NonFiniteTensor: the tensors do not fit the configuration.
    """
    folder = Path(directory)
    return settled(folder, FILES, lambda: _read(folder))


def _read(folder: Path) -> Adapter:
    config = read_json(folder / CONFIG)
    start = relative_start(config)
    if start is not None:
        raise UnsupportedAdapter(
            f"{folder}: its pairs are relative to a base that init_lora_weights {start!r} had changed; expected "
            f"changes of the pretrained weights: load it on its base and save it, which writes those"
        )
    return read_pairs(folder, config)


def read_pairs(folder: Path, config: Mapping[str, Any]) -> Adapter:
    """Like :func:`read_adapter`; where the configuration has a relative start, with the pairs as they are stored."""
    tensors = read_tensors(folder / TENSORS)
    fields = named_whole(stated_fields(folder / CONFIG, config), tensors)
    whole = {key: tensors.pop(key) for key in whole_keys(tensors, config, fields)}
    parts = by_site(folder / TENSORS, tensors, config)
    selection = stated_selection(folder / CONFIG, config, fields)
    selection.check(parts)
    reader = SiteReader(folder, config, fields, list(parts))
    stored = {path: reader.site(path, part) for path, part in parts.items()}
    extra, probes = read_extra(folder, stored)
    unlike_peft = read_unlike_peft(folder / EXTRA, extra)
    sites = {path: _site_adapter(site, unlike_peft.get(path, "")) for path, site in stored.items()}
    return Adapter(
        _recorded(folder / EXTRA, extra, LoRA(**fields)),
        sites,
        fields["target_modules"] if selection.by_ends_alone else one_of_each(sites),
        probes,
        config.get("base_model_name_or_path"),
        whole_tensors(folder / TENSORS, whole),
        extra.get("base_quantised") is True,
        task if isinstance(task := config.get("task_type"), str) else None,
    )


def _site_adapter(site: StoredSite, unlike_peft: str) -> SiteAdapter:
    delta = LowRank(at_least_fp32(site.B), at_least_fp32(site.A), site.scale)
    return SiteAdapter(site.kind, delta, site.kernel, site.groups, site.extra, unlike_peft)


def _recorded(source: Path, extra: Mapping[str, Any], stated: LoRA) -> LoRA:
    """The spec that the adapter was made with; what PEFT's configuration states as well is taken from there."""
    if "spec" not in extra:
        return stated
    stated = replace(stated, variant=variant_recorded(name_of(VARIANTS, stated.variant), extra))
    try:
        spec = LoRA.from_dict(extra["spec"])
    except (SpecError, TypeError) as error:  # of a method that is not in this process's tables, or not a spec
        log.warning("%s: the recorded spec is left aside: %s", source, error)
        return stated
    assert isinstance(spec.scaling, Scaling) and isinstance(stated.scaling, Scaling)
    return replace(
        spec,
        scaling=spec.scaling if spec.scaling.use_rslora == stated.scaling.use_rslora else stated.scaling,
        variant=stated.variant,
        dropout=stated.dropout,
        modules_to_save=stated.modules_to_save,
        bias=stated.bias,
        trainable_token_indices=stated.trainable_token_indices,
    )
