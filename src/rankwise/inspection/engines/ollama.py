"""Ollama, which reads GGUF adapters, and PEFT directories through a converter of its own."""

from collections.abc import Iterable

from rankwise.inspection.engines.llama_cpp import GGUF_LIMITS
from rankwise.inspection.engines.rules import (
    WHOLE_ADAPTER,
    Case,
    Engine,
    Rule,
    adalora,
    mis_scaled,
    rslora,
)

_FAMILIES = ("llama", "mistral", "gemma-2")  # in a base's name
_MODEL_TYPES = ("llama", "mistral", "gemma2")
_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _other_family(case: Case) -> Iterable[str]:
    if case.base is not None:
        read = case.base.model_type in _MODEL_TYPES
    else:
        read = any(family in (case.facts.base_model or "").lower() for family in _FAMILIES)
    return () if read else WHOLE_ADAPTER


def _gemma(case: Case) -> bool:
    if case.base is not None:
        return case.base.model_type == "gemma2"
    return "gemma-2" in (case.facts.base_model or "").lower()


def _rotated(case: Case) -> Iterable[str]:
    """Queries and keys, whose rows are in another order in a llama's GGUF."""
    sites = [site.name for site in case.facts.sites if site.name.rpartition(".")[2] in ("q_proj", "k_proj")]
    return [] if _gemma(case) else sites


def _other_layers(case: Case) -> Iterable[str]:
    return [site.name for site in case.facts.sites if site.name.rpartition(".")[2] not in _LAYERS]


def _fractional_alpha(case: Case) -> Iterable[str]:
    whole = case.facts.spec is None or isinstance(case.facts.spec["alpha"], int)
    return () if whole else WHOLE_ADAPTER


def _note(case: Case) -> str:
    return "an ADAPTER line with this directory"


_LLAMA = "convert/convert_llama_adapter.go: llamaAdapter"

OLLAMA = Engine(
    label="Ollama",
    version="0.33.0-rc2",
    format="ollama",
    rules=(
        *GGUF_LIMITS,
        Rule(
            "another base than llama, mistral or gemma2",
            "refuses",
            "its converter knows no other architecture's layers",
            "convert/convert.go: ConvertAdapter",
            "rewrite",
            _other_family,
        ),
        Rule(
            "a layer beside those of attention and MLP",
            "refuses",
            "its converter has no name for it",
            f"{_LLAMA}.Replacements",
            "rewrite",
            _other_layers,
        ),
        Rule(
            "an alpha that is no whole number",
            "refuses",
            "lora_alpha is read as one",
            "convert/convert.go: AdapterParameters",
            "rewrite",
            _fractional_alpha,
        ),
        Rule("AdaLoRA", "refuses", "its converter knows no lora_E", f"{_LLAMA}.Replacements", "rewrite", adalora),
        Rule(
            "queries and keys",
            "misreads",
            "its converter puts columns of lora_A into the order in which the base has the rows of lora_B",
            f"{_LLAMA}.repack",
            "rewrite",
            _rotated,
        ),
        Rule(
            "rsLoRA", "mis-scales", "use_rslora is not read", "convert/convert.go: AdapterParameters", "rewrite", rslora
        ),
        Rule(
            "alphas of single layers",
            "mis-scales",
            "one alpha is read for all",
            "convert/convert.go: AdapterParameters.KV",
            "rewrite",
            mis_scaled(lambda site_rank, rank, alpha: alpha / site_rank),
        ),
    ),
    note=_note,
    start="cd {out} && ollama create my-adapter",
    start_merged="cd {out} && ollama create my-model",
)
