"""PEFT's adapter directory: ``adapter_config.json`` + ``adapter_model.safetensors``, from and to an :class:`Adapter`.

A run that started from a pair (A₀, B₀) is written as the plain rank-2r adapter [A; δA], [δB, B₀], exact on the clean
base in every engine, with α chosen so that s is kept.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.adapter import Adapter, SiteAdapter, read_probes
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.errors import (
    BrokenFile,
    MissingTensor,
    NonFiniteTensor,
    ShapeMismatch,
    SpecError,
    TargetError,
    UnexpectedTensor,
    UnsafeFile,
    UnsupportedAdapter,
)
from rankwise.files import read_json, read_tensors, write_json, write_tensors
from rankwise.format import adalora
from rankwise.methods import name_of
from rankwise.planning import keys_under, pattern_values
from rankwise.scaling import Scaling, declared
from rankwise.spec import LoRA
from rankwise.variants import VARIANTS
from rankwise.variants.base import PairVariant

log = logging.getLogger("rankwise")

CONFIG, TENSORS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "rankwise.json"
PREFIX = "base_model.model."
FORMAT_VERSION = 1


def write_adapter(adapter: Adapter, directory: str | Path) -> None:
    """Write an adapter as a PEFT directory, plus ``rankwise.json`` (its spec, and a probe of its base).

    Raises:
        UnsupportedAdapter: a site has tensors that its variant does not declare, so no reader would know them.
        NonFiniteTensor: the adapter holds NaN or infinity. Nothing is written on either error.
    """
    folder = Path(directory)
    _check_expressible(adapter)
    tensors: dict[str, Tensor] = {}
    for path, site in adapter.sites.items():
        tensors |= {f"{PREFIX}{path}.{suffix}": tensor for suffix, tensor in _wire(site).items()}
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in adapter.saved.items()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteTensor(f"{key} holds NaN or infinity, so {folder} was not written; the training diverged")
    write_tensors(folder / TENSORS, tensors, {})
    write_json(folder / EXTRA, _extra(adapter))
    write_json(folder / CONFIG, _config(adapter))  # last: a directory without it is no adapter


def _check_expressible(adapter: Adapter) -> None:
    variant = adapter.spec.variant
    assert isinstance(variant, PairVariant)
    for path, site in adapter.sites.items():
        unknown = sorted(set(site.extra) - set(variant.tensors))
        if unknown:
            raise UnsupportedAdapter(
                f"{path}: variant {name_of(VARIANTS, variant)!r} gives the file {unknown[0]}, which it does not name "
                f"in its tensors, so that no reader would take it; expected a pair and {variant.tensors or 'no more'}: "
                f"name the tensor there, or derive the variant from Variant, which saves its layers' own state"
            )


def _wire(site: SiteAdapter) -> dict[str, Tensor]:
    """File suffix → tensor in PEFT's shapes."""
    A, B = site.delta.A, site.delta.B
    if site.kind == "embedding":
        return {"lora_embedding_A": A, "lora_embedding_B": B, **site.extra}
    if site.kind == "conv2d":
        A, B = _conv_A(A, site.kernel, site.groups), B[:, :, None, None]
    return {"lora_A.weight": A, "lora_B.weight": B, **site.extra}


def _conv_A(A: Tensor, kernel: tuple[int, ...], groups: int) -> Tensor:
    """[r, in/groups·kh·kw] as (groups·r, in, kh, kw): PEFT's lora_A sees all channels, so A stands once per group."""
    filters = A.reshape(-1, *kernel)
    blocks = filters.new_zeros(groups, filters.shape[0], groups, *kernel)
    for group in range(groups):
        blocks[group, :, group] = filters
    return blocks.flatten(2, 3).flatten(0, 1)


def _extra(adapter: Adapter) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "spec": adapter.spec.to_dict(),
        "sites": list(adapter.sites),
        "base_probe": {path: list(values) for path, values in adapter.base_probe.items()},
        "base_quantised": adapter.base_quantised,
    }


def _config(adapter: Adapter) -> dict[str, Any]:
    spec = adapter.spec
    assert isinstance(spec.scaling, Scaling) and isinstance(spec.variant, PairVariant)
    use_rslora = spec.scaling.use_rslora
    ranks = {path: site.delta.rank * site.groups for path, site in adapter.sites.items()}
    alphas = {path: _alpha(declared(use_rslora), site.delta.scale, ranks[path]) for path, site in adapter.sites.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
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
        "bias": "none",
        "modules_to_save": list(spec.modules_to_save) or None,
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


BASE_COPY = "base_layer"  # PEFT saves an adapted embedding's own weight along
_KEY = re.compile(rf"(?P<path>.+)\.(?P<suffix>lora_\w+|{BASE_COPY})(\.weight)?$")
_DEFAULTS: dict[str, Any] = {  # fields that change what an adapter computes, with the one value that is read here
    "lora_bias": False,
    "megatron_config": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
}
_RUNS_CODE = ("auto_map", "trust_remote_code", "custom_code")
_TYPES: dict[str, type] = {
    "base_model_name_or_path": str,
    "use_rslora": bool,
    "use_dora": bool,
    "fan_in_fan_out": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}


def read_adapter(directory: str | Path) -> Adapter:
    """The adapter in a PEFT directory, whoever wrote it.

    Raises:
        BrokenFile, UnsafeFile: the files are absent, truncated, malformed, a pickle, or lead out of the directory.
        UnsupportedAdapter: not LoRA, or with parts that are not read here.
        SpecError: rank or alpha that is not a positive number.
        MissingTensor, UnexpectedTensor, ShapeMismatch, NonFiniteTensor: the tensors do not fit the configuration.
    """
    folder = Path(directory)
    config = read_json(folder / CONFIG)
    where = folder / CONFIG
    check_supported(where, config)
    tensors = read_tensors(folder / TENSORS)
    if config["peft_type"] == "ADALORA":
        config, tensors = adalora.as_lora(folder, config, tensors)
    extra = read_json(folder / EXTRA) if (folder / EXTRA).is_file() else {}
    spec = spec_of(where, config)
    saved = _saved_whole(tensors, spec.modules_to_save)
    parts = by_site(folder / TENSORS, {key: tensor for key, tensor in tensors.items() if key not in saved})
    ranks, alphas = ranks_and_alphas(where, spec, list(parts))
    sites = {
        path: read_site(folder / TENSORS, path, found, spec, ranks[path], alphas[path]) for path, found in parts.items()
    }
    check_extra(folder / EXTRA, extra)
    missing = [path for path in extra.get("sites", ()) if path not in sites]
    if missing:
        raise MissingTensor(f"{folder / TENSORS}: no tensors for {missing[0]}, which {EXTRA} lists; it is incomplete")
    probes = read_probes(folder / EXTRA, extra)
    whole = {key.removeprefix(PREFIX): tensor for key, tensor in saved.items()}
    return Adapter(
        _recorded(folder / EXTRA, extra, spec),
        sites,
        _targets(where, config),
        probes,
        config.get("base_model_name_or_path"),
        whole,
        extra.get("base_quantised") is True,
    )


def _recorded(where: Path, extra: Mapping[str, Any], stated: LoRA) -> LoRA:
    """The spec that the adapter was made with; what PEFT's configuration states as well is taken from there."""
    if "spec" not in extra:
        return stated
    try:
        spec = LoRA.from_dict(extra["spec"])
    except (SpecError, TypeError) as error:  # of a method that is not in this process's tables, or not a spec
        log.warning("%s: the recorded spec is left aside: %s", where, error)
        return stated
    assert isinstance(spec.scaling, Scaling) and isinstance(stated.scaling, Scaling)
    return replace(
        spec,
        scaling=spec.scaling if spec.scaling.use_rslora == stated.scaling.use_rslora else stated.scaling,
        variant=stated.variant,
        dropout=stated.dropout,
        modules_to_save=stated.modules_to_save,
    )


def check_extra(where: Path, extra: Mapping[str, Any]) -> None:
    """Refuse a ``rankwise.json`` of another form.

    Raises:
        BrokenFile: as it says.
    """
    version, listed = extra.get("format_version", FORMAT_VERSION), extra.get("sites", [])
    if version != FORMAT_VERSION:
        raise BrokenFile(
            f"{where}: format_version is {version!r}, expected {FORMAT_VERSION}; a newer rankwise wrote it"
        )
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise BrokenFile(f"{where}: expected a list of module names under sites; delete the file or save anew")


def check_supported(where: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration of an adapter that is not read here.

    Raises:
        UnsafeFile: it asks for code of its own. BrokenFile: it is no adapter's. UnsupportedAdapter: of another kind.
    """
    for name in _RUNS_CODE:
        if config.get(name):
            raise UnsafeFile(
                f"{where}: {name} asks to run code that comes with the adapter; none is run here: remove it"
            )
    kind = config.get("peft_type")
    if kind is None:
        raise BrokenFile(f"{where}: no peft_type; expected 'LORA': this is not an adapter's configuration")
    if kind not in ("LORA", "ADALORA"):
        raise UnsupportedAdapter(f"{where}: peft_type is {kind!r}; expected 'LORA' or 'ADALORA'")
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapter(f"{where}: bias is {config['bias']!r}; expected 'none' (trained biases are not read)")
    for name, kinds in _TYPES.items():
        if not isinstance(config.get(name), kinds | None):
            raise BrokenFile(f"{where}: {name} is {config[name]!r}; expected {kinds.__name__} or null")
    for name, value in _DEFAULTS.items():
        if config.get(name, value) not in (value, [], {}):
            raise UnsupportedAdapter(f"{where}: {name} is {config[name]!r}; expected {value!r}")


def spec_of(where: Path, config: Mapping[str, Any]) -> LoRA:
    """What a configuration says, as a spec.

    Raises:
        SpecError: a field is out of range.
    """
    try:
        return LoRA(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            target_modules=config.get("target_modules") or "all-linear",
            scaling="rslora" if config.get("use_rslora") else "lora",
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            exclude_modules=config.get("exclude_modules") or (),
            modules_to_save=config.get("modules_to_save") or (),
            dropout=config.get("lora_dropout") or 0.0,
            variant=variant_marked(config),
        )
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def variant_marked(config: Mapping[str, Any]) -> str:
    """The variant whose marks a configuration bears; "lora" where there is none."""
    for name, variant in _pair_variants().items():
        if variant.marks and all(config.get(key) == value for key, value in variant.marks.items()):
            return name
    return "lora"


def _pair_variants() -> dict[str, type[PairVariant]]:
    return {name: method.cls for name, method in VARIANTS.items() if issubclass(method.cls, PairVariant)}


def _targets(where: Path, config: Mapping[str, Any]) -> str | tuple[str, ...]:
    targets = config.get("target_modules") or ()
    if config.get("layers_to_transform") is not None:
        return ()  # the names select more than the adapter has
    return targets if isinstance(targets, str) else tuple(targets)


def _saved_whole(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of ``modules_to_save``, which stand in the file under their own names."""
    return {key: tensors[key] for key in keys_under(names, tensors)}


def by_site(where: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path → file suffix → tensor.

    Raises:
        UnexpectedTensor: one is no site's. MissingTensor: there are none.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place = site_and_suffix(key)
        if place is None:
            raise stray(where, key, tuple(tensor.shape))
        found.setdefault(place[0], {})[place[1]] = tensor
    if not found:
        raise MissingTensor(f"{where}: holds no tensors; expected lora_A and lora_B of at least one module")
    return found


def site_and_suffix(key: str) -> tuple[str, str] | None:
    """Module path and kind of tensor that a name in the file tells of; None where it is no site's."""
    match = _KEY.match(key.removeprefix(PREFIX))
    return None if match is None else (match["path"], match["suffix"])


def stray(where: Path, key: str, shape: tuple[int, ...]) -> UnexpectedTensor:
    """The error for a tensor that is no site's."""
    return UnexpectedTensor(f"{where}: {key} {shape} belongs to no adapter site; it is not read")


def ranks_and_alphas(where: Path, spec: LoRA, paths: list[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of each site that a file has.

    Raises:
        SpecError: a pattern takes too long.
    """
    try:
        ranks = pattern_values("rank_pattern key", spec.rank_pattern, paths, spec.rank)
        return ranks, pattern_values("alpha_pattern key", spec.alpha_pattern, paths, spec.alpha)
    except TargetError as error:
        raise SpecError(f"{where}: {error}") from None


def read_site(where: Path, path: str, found: dict[str, Tensor], spec: LoRA, rank: int, alpha: float) -> SiteAdapter:
    """One site's part of an adapter from its tensors, by file suffix; they are taken out of ``found``.

    Raises:
        MissingTensor, UnexpectedTensor, ShapeMismatch, UnsupportedAdapter: they do not make one.
    """
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    name_A, name_B = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name, other in ((name_A, name_B), (name_B, name_A)):
        if name not in found:
            raise MissingTensor(f"{where}: {path} has {other} but no {name}; expected both halves of the pair")
    A, B = found.pop(name_A), found.pop(name_B)
    _check_declared(where, path, found, spec)
    _check_pair(where, path, A, B, rank)
    scale = spec.scale(rank, alpha)
    kind = "embedding" if embedding else "conv2d" if A.dim() == 4 else "linear"
    groups = rank // B.shape[1]  # a grouped convolution's B has rank/groups columns
    A = _shared_A(where, path, A, groups)
    delta = LowRank(at_least_fp32(B.flatten(1)), at_least_fp32(A.flatten(1)), scale)
    return SiteAdapter(kind, delta, tuple(A.shape[1:]) if kind == "conv2d" else (), groups, found)


def _check_declared(where: Path, path: str, beside: Iterable[str], spec: LoRA) -> None:
    """What stands beside a pair must be the variant's; loading the rest would be another function."""
    assert isinstance(spec.variant, PairVariant)
    for suffix in beside:
        if suffix not in (*spec.variant.tensors, BASE_COPY):
            marks = [v.marks for v in _pair_variants().values() if suffix in v.tensors]
            hint = f"; {CONFIG} does not say {', '.join(marks[0])}" if marks else ""
            raise UnexpectedTensor(f"{where}: {path} has {suffix}, which the configured adapter does not have{hint}")


def _shared_A(where: Path, path: str, A: Tensor, groups: int) -> Tensor:
    """(groups·r, in, kh, kw) as (r, in/groups, kh, kw): undoes :func:`_conv_A`.

    Raises:
        ShapeMismatch: the channels do not divide into groups.
        UnsupportedAdapter: A mixes channels across groups, so ΔW is no grouped convolution.
    """
    if groups == 1:
        return A
    if A.shape[1] % groups:
        raise ShapeMismatch(
            f"{where}: {path}: lora_A {tuple(A.shape)} has {A.shape[1]} channels, which do not divide into the "
            f"{groups} groups that lora_B's columns tell of"
        )
    blocks = A.view(groups, -1, groups, A.shape[1] // groups, *A.shape[2:])
    shared = blocks[0, :, 0]
    same = all(
        torch.equal(blocks[i, :, j], shared if i == j else torch.zeros_like(shared))
        for i in range(groups)
        for j in range(groups)
    )
    if not same:
        raise UnsupportedAdapter(
            f"{where}: {path}: its lora_A mixes channels across the {groups} groups of the convolution, so it cannot "
            f"be folded into the weight; expected one A shared by all groups"
        )
    return shared


def _check_pair(where: Path, path: str, A: Tensor, B: Tensor, rank: int) -> None:
    fits = A.dim() == B.dim() and A.dim() in (2, 4) and A.shape[0] == rank
    fits = fits and (B.shape[1] == rank or (A.dim() == 4 and B.shape[1] > 0 and rank % B.shape[1] == 0))
    fits = fits and all(size == 1 for size in B.shape[2:])
    if not fits or not A.is_floating_point() or not B.is_floating_point():
        raise ShapeMismatch(
            f"{where}: {path}: lora_A {tuple(A.shape)} {A.dtype} and lora_B {tuple(B.shape)} {B.dtype} do not make a "
            f"pair of rank {rank}, which {CONFIG} gives; expected ({rank}, in) and (out, {rank})"
        )
