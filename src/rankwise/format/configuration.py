"""An ``adapter_config.json``, whoever wrote it, as the fields of a spec. Reading a plain one needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.base_probe import read_probes
from rankwise.errors import BrokenFile, MissingTensor, SpecError, UnsafeFile, UnsupportedAdapter
from rankwise.files import read_json
from rankwise.format.names import EXTRA, FORMAT_VERSION, OWN, TENSORS
from rankwise.methods import name_of, nearest, resolve
from rankwise.spec_checks import checked
from rankwise.variants import VARIANTS

if TYPE_CHECKING:
    from rankwise.variants.base import PairVariant

# Entries that change what an adapter computes, with the value at which they do not; an empty one is off as well.
_NEUTRAL: dict[str, Any] = {
    "lora_bias": False,
    "megatron_config": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
_OFF: tuple[Any, ...] = (None, False, "", [], {})
# Task → the heads that PEFT trains whole, without being told, where the model has them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
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
_READ = {
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "init_lora_weights", "init_r",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_modules", "trainable_token_indices", "use_rslora",
}  # fmt: skip
# Of training, of the search for a start, of how a layer stores its weight, or for the reader.
_WITHOUT_EFFECT = {
    "auto_mapping", "beta1", "beta2", "corda_config", "deltaT", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "orth_reg_weight", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_r", "task_type", "tfinal", "tinit", "total_step", "velora_config",
}  # fmt: skip
# Starts that leave the base as it is, so that a pair means ΔW = s·B A.
_PLAIN_STARTS = (*_OFF, True, "gaussian", "eva", "orthogonal", "mica")
# Starts that PEFT takes off the base, and finds again from the base alone.
_REPEATABLE_STARTS = ("pissa", "olora")
_OTHER_STARTS = ("pissa_niter_", "corda", "lora_ga", "loftq")


def stated_fields(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec that a configuration states, each in range.

    Args:
        source: the file, for the error.

    Raises:
        UnsafeFile: it asks for code of its own. BrokenFile: it is no adapter's. UnsupportedAdapter: of a kind that is
            not read here. SpecError: a field is out of range.
    """
    _check_supported(source, config)
    pruned = is_adalora(config)  # its rank_pattern lists which directions were kept, not ranks
    fields = {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "target_modules": config.get("target_modules") or "all-linear",
        "scaling": "rslora" if config.get("use_rslora") and not pruned else "lora",
        "rank_pattern": {} if pruned else config.get("rank_pattern") or {},
        "alpha_pattern": {} if pruned else config.get("alpha_pattern") or {},
        "exclude_modules": config.get("exclude_modules") or (),
        "modules_to_save": _whole_modules(config),
        "dropout": config.get("lora_dropout") or 0.0,
        "variant": variant_marked(config),
        "bias": config.get("bias") or "none",
        "trainable_token_indices": config.get("trainable_token_indices") or None,
        "layers_to_transform": None if (layers := config.get("layers_to_transform")) == [] else layers,
        "layers_pattern": config.get("layers_pattern") or (),
    }
    try:
        return {name: checked(name, value) for name, value in fields.items()}
    except SpecError as error:
        raise SpecError(f"{source}: {error}") from None


def _whole_modules(config: Mapping[str, Any]) -> Any:
    """The modules that are trained whole: those named, and the heads that PEFT adds for a task."""
    names, heads = config.get("modules_to_save") or [], _HEADS.get(str(config.get("task_type")), ())
    return [*names, *heads] if isinstance(names, list) else names


def _check_supported(source: Path, config: Mapping[str, Any]) -> None:
    for name in _RUNS_CODE:
        if config.get(name):
            raise UnsafeFile(
                f"{source}: {name} asks to run code that comes with the adapter; none is run here: remove it"
            )
    kind = config.get("peft_type")
    if kind is None:
        raise BrokenFile(f"{source}: no peft_type; expected 'LORA': this is not an adapter's configuration")
    if kind not in ("LORA", "ADALORA"):
        raise UnsupportedAdapter(f"{source}: peft_type is {kind!r}; expected 'LORA' or 'ADALORA'")
    for name, kinds in _TYPES.items():
        if not isinstance(config.get(name), kinds | None):
            raise BrokenFile(f"{source}: {name} is {config[name]!r}; expected {kinds.__name__} or null")
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in (*_OFF, neutral):
            raise UnsupportedAdapter(
                f"{source}: {name} is {config[name]!r}; expected {neutral!r}: it changes what the adapter computes and "
                f"is not read here; merge it into its base with the library that wrote it"
            )
    _check_known(source, config)
    _check_start(source, config)


def _check_known(source: Path, config: Mapping[str, Any]) -> None:
    """Refuse what may mean anything: the entries of a newer PEFT's, or of another library's."""
    for name in _unknown(config):
        if not any(config[name] == variant.marks.get(name) for variant in pair_variants().values()):
            raise UnsupportedAdapter(
                f"{source}: {name} is {config[name]!r}, an entry that is not known here and may change what the "
                f"adapter computes; expected PEFT's entries: remove it if it does not{nearest(name, _READ)}"
            )


def _unknown(config: Mapping[str, Any]) -> list[str]:
    """The entries that are on, and are no plain LoRA's."""
    known = {*_READ, *_WITHOUT_EFFECT, *_NEUTRAL}
    return [name for name, value in config.items() if name not in known and value not in _OFF]


def _check_start(source: Path, config: Mapping[str, Any]) -> None:
    start = config.get("init_lora_weights")
    if is_adalora(config) or start in _PLAIN_STARTS or relative_start(config):
        return
    if not isinstance(start, str) or not start.startswith(_OTHER_STARTS):
        known = ", ".join(map(str, (*_PLAIN_STARTS[len(_OFF) :], *_REPEATABLE_STARTS)))
        raise UnsupportedAdapter(f"{source}: init_lora_weights is {start!r}; expected one of {known}")
    raise UnsupportedAdapter(
        f"{source}: init_lora_weights is {start!r}: its pair was trained on a base that the start had changed, and no "
        f"file holds that base; expected a change of the pretrained one: where it was trained, convert it with PEFT's "
        f"save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter before its first step>)"
    )


def relative_start(config: Mapping[str, Any]) -> str | None:
    """The start that PEFT took off the base before training, and takes off again whenever it reads the file.

    The pair is then relative to that base: see :mod:`rankwise.format.relative`. None where ΔW = s·B A.
    """
    start = config.get("init_lora_weights")
    return start if start in _REPEATABLE_STARTS and not is_adalora(config) else None


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a directory that rankwise alone reads."""
    return str(config.get("peft_type")).startswith(OWN)


def is_adalora(config: Mapping[str, Any]) -> bool:
    """Whether PEFT's AdaLoRA wrote it."""
    return config.get("peft_type") == "ADALORA"


def variant_marked(config: Mapping[str, Any]) -> str:
    """The variant whose marks a configuration bears; "lora" where there is none."""
    if _unknown(config):
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


def read_unlike_peft(source: Path, extra: Mapping[str, Any]) -> dict[str, str]:
    """Module path → what PEFT's layer leaves out, as ``rankwise.json`` says.

    Raises:
        BrokenFile: it says anything else.
    """
    left_out = extra.get("unlike_peft", {})
    if not isinstance(left_out, dict) or not all(isinstance(reason, str) for reason in left_out.values()):
        raise BrokenFile(f"{source}: expected module path → text under unlike_peft; delete the file or save anew")
    return left_out


def read_extra(folder: Path, sites: Collection[str]) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    """What ``rankwise.json`` says, where there is one, and the probe of the base in it.

    Args:
        sites: those that the directory has tensors for.

    Raises:
        BrokenFile, UnsafeFile: it cannot be trusted, or is of another form. MissingTensor: it lists a site more.
    """
    source = folder / EXTRA
    extra = read_json(source) if source.is_file() else {}
    version, listed = extra.get("format_version", FORMAT_VERSION), extra.get("sites", [])
    if version != FORMAT_VERSION:
        raise BrokenFile(
            f"{source}: format_version is {version!r}, expected {FORMAT_VERSION}; a newer rankwise wrote it"
        )
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise BrokenFile(f"{source}: expected a list of module names under sites; delete the file or save anew")
    missing = [path for path in listed if path not in sites]
    if missing:
        raise MissingTensor(f"{folder / TENSORS}: no tensors for {missing[0]}, which {EXTRA} lists; it is incomplete")
    return extra, read_probes(source, extra)
