"""Which engines read an adapter right as it stands, and what to do for the others."""

import math
from collections.abc import Callable, Iterator

from rankwise.format.names import OWN
from rankwise.inspection.facts import Answer, Inspection, SiteFacts, Verdict
from rankwise.scaling import declared

_HEADS = ("lm_head", "embed_out", "output_projection")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What its own converter of safetensors knows (convert/convert.go and convert_llama_adapter.go).
_OLLAMA_FAMILIES = ("llama", "mistral", "gemma-2")
_OLLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_FOLD = "fold scales into B, pad to one rank, alpha = rank"

Rule = tuple[bool, Answer, str]  # whether it applies, and what it then says


def verdicts(facts: Inspection) -> tuple[Verdict, ...]:
    """Each engine's, by the first of its rules that applies."""
    return tuple(_verdict(engine, rules(facts)) for engine, rules in ENGINES.items())


def _verdict(engine: str, rules: Iterator[Rule]) -> Verdict:
    return next(Verdict(engine, answer, reason) for applies, answer, reason in rules if applies)


def _rankwise(facts: Inspection) -> Iterator[Rule]:
    yield True, "yes", ""


def _peft(facts: Inspection) -> Iterator[Rule]:
    yield _own_form(facts)
    path, left_out = next(iter(facts.unlike_peft.items()), ("", ""))
    yield bool(path), "no", f"its layer for the convolution {path} lacks {left_out}: load it here, or merge it"
    yield True, "yes", ""


def _vllm(facts: Inspection) -> Iterator[Rule]:
    yield from _lora_only(facts)
    yield bool(facts.spec and facts.spec["modules_to_save"]), "no", "any modules_to_save is refused: merge it"
    rank = _largest_rank(facts)
    yield rank > _VLLM_RANKS[-1], "no", f"ranks above {_VLLM_RANKS[-1]} are refused: merge it into its base"
    yield _misread(facts, lambda site, rank, alpha: declared(_states(facts, "scaling", "rslora"))(alpha, rank))
    limit = min(limit for limit in _VLLM_RANKS if limit >= rank)
    yield rank > 16, "yes", f"start it with --max-lora-rank {limit} (its default is 16)"
    yield True, "yes", ""


def _sglang(facts: Inspection) -> Iterator[Rule]:
    yield from _lora_only(facts)
    yield _whole(facts)
    yield _uneven(facts)
    yield _misread(facts, lambda site, rank, alpha: alpha / rank)
    yield True, "yes", f"declare --max-lora-rank {_largest_rank(facts)} and the target modules up front"


def _llama_cpp(facts: Inspection) -> Iterator[Rule]:
    yield from _lora_only(facts)
    yield _whole(facts)
    yield _misread(facts, lambda site, rank, alpha: alpha / site.rank)
    how = "convert it to GGUF (convert_lora_to_gguf.py)"
    yield not _layers(facts).isdisjoint(_HEADS), "after export", f"{how}, which refuses a head tied to the embedding"
    yield True, "after export", how


def _ollama(facts: Inspection) -> Iterator[Rule]:
    yield from _lora_only(facts)
    yield _whole(facts)
    outer = "embedding" in _kinds(facts) or not _layers(facts).isdisjoint(_HEADS)
    yield outer, "no", "adapters on embeddings or the output head are not read: merge it into its base"
    yield _misread(facts, lambda site, rank, alpha: alpha / site.rank)
    base = (facts.base_model or "").lower()
    named = any(family in base for family in _OLLAMA_FAMILIES) and _layers(facts) <= _OLLAMA_LAYERS
    whole_alpha = facts.spec is not None and isinstance(facts.spec["alpha"], int)
    yield named and whole_alpha, "yes", "an ADAPTER line with this directory"
    why = "of this family, these layers," if not named else "of an alpha that is no whole number"
    yield True, "after export", f"{why} only GGUF is read: convert it (convert_lora_to_gguf.py)"


def _mlx(facts: Inspection) -> Iterator[Rule]:
    yield from _lora_only(facts)
    yield _whole(facts)
    yield _uneven(facts)
    yield True, "after export", "it reads adapters.safetensors with transposed lora_a and lora_b"


ENGINES: dict[str, Callable[[Inspection], Iterator[Rule]]] = {
    "rankwise": _rankwise,
    "PEFT": _peft,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "llama.cpp": _llama_cpp,
    "Ollama": _ollama,
    "MLX": _mlx,
}


def _own_form(facts: Inspection) -> Rule:
    applies = (facts.peft_type or "").startswith(OWN)
    return applies, "no", "its layers' own state, which rankwise alone reads: load it there"


def _lora_only(facts: Inspection) -> Iterator[Rule]:
    yield _own_form(facts)
    yield _states(facts, "variant", "dora"), "no", "DoRA's magnitudes are not read: merge it into its base"
    yield "conv2d" in _kinds(facts), "no", "convolutions are not read: merge it into its base"
    relative = "load it on its base here and save it: that writes changes of the pretrained weights"
    yield facts.relative_to is not None, "after export", relative
    yield facts.peft_type == "ADALORA", "after export", "load it here and save it: that writes plain LoRA"


def _whole(facts: Inspection) -> Rule:
    return bool(facts.replaced), "no", "modules that are replaced whole are not read: merge it into its base"


def _uneven(facts: Inspection) -> Rule:
    uneven = len({(site.rank, site.scale) for site in facts.sites}) > 1
    return uneven, "after export", f"one rank and one scale are read for all layers: {_FOLD}"


def _misread(facts: Inspection, scale: Callable[[SiteFacts, int, float], float]) -> Rule:
    """Of an engine that makes ``scale(site, rank, alpha)`` of the configuration's rank and alpha."""
    spec = facts.spec or {"rank": 1, "alpha": 1}
    wrong = next((s for s in facts.sites if not math.isclose(s.scale, scale(s, spec["rank"], spec["alpha"]))), None)
    return wrong is not None, "after export", f"it takes another scale for {wrong and wrong.name}: {_FOLD}"


def _states(facts: Inspection, field: str, value: str) -> bool:
    return facts.spec is not None and facts.spec[field] == value


def _kinds(facts: Inspection) -> set[str]:
    return {site.kind for site in facts.sites}


def _layers(facts: Inspection) -> set[str]:
    return {site.name.rpartition(".")[2] for site in facts.sites}


def _largest_rank(facts: Inspection) -> int:
    return max(site.rank for site in facts.sites)
