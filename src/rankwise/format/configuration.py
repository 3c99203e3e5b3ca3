"""An ``adapter_config.json``, whoever wrote it, as the fields of a spec. Reading a plain one needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import BrokenFile, SpecError, TargetError, UnsafeFile, UnsupportedAdapter
from rankwise.format.names import FORMAT_VERSION, OWN
from rankwise.methods import name_of, resolve
from rankwise.patterns import pattern_values
from rankwise.spec import LoRA, checked
from rankwise.variants import VARIANTS

if TYPE_CHECKING:
    from rankwise.variants.base import PairVariant

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
# Fields of PEFT's that mark no variant, whatever they say.
_NO_MARKS = {
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "init_r", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


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


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a directory that rankwise alone reads."""
    return str(config.get("peft_type")).startswith(OWN)


def stated_fields(where: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec that a configuration states, each in range.

    Raises:
        SpecError: one is out of range.
    """
    fields = {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "target_modules": config.get("target_modules") or "all-linear",
        "scaling": "rslora" if config.get("use_rslora") else "lora",
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "exclude_modules": config.get("exclude_modules") or (),
        "modules_to_save": config.get("modules_to_save") or (),
        "dropout": config.get("lora_dropout") or 0.0,
        "variant": variant_marked(config),
    }
    try:
        return {name: checked(name, value) for name, value in fields.items()}
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def spec_of(where: Path, config: Mapping[str, Any]) -> LoRA:
    """What a configuration says, as a spec.

    Raises:
        SpecError: a field is out of range.
    """
    return LoRA(**stated_fields(where, config))


def variant_marked(config: Mapping[str, Any]) -> str:
    """The variant whose marks a configuration bears; "lora" where there is none."""
    if any(value for name, value in config.items() if name not in _NO_MARKS):
        for name, variant in pair_variants().items():
            if variant.marks and all(config.get(key) == value for key, value in variant.marks.items()):
                return name
    return "lora"


def variant_recorded(stated: str, extra: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """The variant, with its options, that ``rankwise.json`` says a file was trained as; else the stated one.

    It must have the same marks, so that the record of a file whose configuration was since changed counts for nothing.
    """
    recorded = extra.get("spec")
    plain = recorded.get("variant") if isinstance(recorded, Mapping) else None
    if not isinstance(plain, str | Mapping) or plain == stated:
        return stated
    try:
        name = name_of(VARIANTS, resolve(VARIANTS, plain, "variant"))
    except SpecError:
        return stated
    variant, configured = pair_variants().get(name), pair_variants()[stated]
    return plain if variant and not variant.saved_as_lora and variant.marks == configured.marks else stated


def pair_variants() -> dict[str, type[PairVariant]]:
    """The table's variants that are written as pairs, imported."""
    from rankwise.variants.base import PairVariant

    return {name: method.cls for name, method in VARIANTS.items() if issubclass(method.cls, PairVariant)}


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


def ranks_and_alphas(
    where: Path, fields: Mapping[str, Any], paths: list[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of each site that a file has.

    Args:
        fields: what the configuration states, see :func:`stated_fields`.

    Raises:
        SpecError: a pattern takes too long.
    """
    try:
        return (
            pattern_values("rank_pattern key", fields["rank_pattern"], paths, fields["rank"]),
            pattern_values("alpha_pattern key", fields["alpha_pattern"], paths, fields["alpha"]),
        )
    except TargetError as error:
        raise SpecError(f"{where}: {error}") from None
