"""Which engines read an adapter right as it stands, and what to do for the others."""

from collections.abc import Callable, Iterable, Iterator

from rankwise.format.names import OWN
from rankwise.inspection.facts import Answer, Inspection, Verdict

_HEADS = ("lm_head", "embed_out", "output_projection")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_OLLAMA_FAMILIES = ("llama", "mistral", "gemma")

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
    yield True, "yes", ""


def _vllm(facts: Inspection) -> Iterator[Rule]:
    yield from _lora_only(facts)
    foreign = _last_parts(facts.replaced) - {"classifier", "score"}
    yield bool(foreign), "no", "replaced modules other than classifier or score are not read: merge it"
    rank = _largest_rank(facts)
    yield rank > _VLLM_RANKS[-1], "no", f"ranks above {_VLLM_RANKS[-1]} are refused: merge it into its base"
    yield _uneven(facts)
    limit = min(limit for limit in _VLLM_RANKS if limit >= rank)
    yield rank > 16, "yes", f"start it with --max-lora-rank {limit} (its default is 16)"
    yield True, "yes", ""


def _sglang(facts: Inspection) -> Iterator[Rule]:
    yield from _lora_only(facts)
    yield _whole(facts)
    yield _uneven(facts)
    yield True, "yes", f"declare --max-lora-rank {_largest_rank(facts)} and the target modules up front"


def _llama_cpp(facts: Inspection) -> Iterator[Rule]:
    yield from _inner_layers_only(facts)
    yield True, "after export", "convert it to GGUF (convert_lora_to_gguf.py)"


def _ollama(facts: Inspection) -> Iterator[Rule]:
    yield from _inner_layers_only(facts)
    base = (facts.base_model or "").lower()
    yield any(family in base for family in _OLLAMA_FAMILIES), "yes", "an ADAPTER line with this directory"
    yield True, "after export", "of this family only GGUF is read: convert it (convert_lora_to_gguf.py)"


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


def _inner_layers_only(facts: Inspection) -> Iterator[Rule]:
    yield from _lora_only(facts)
    yield _whole(facts)
    outer = "embedding" in _kinds(facts) or not _last_parts(site.name for site in facts.sites).isdisjoint(_HEADS)
    yield outer, "no", "adapters on embeddings or the output head are not read: merge it into its base"
    yield _uneven(facts)


def _whole(facts: Inspection) -> Rule:
    return bool(facts.replaced), "no", "modules that are replaced whole are not read: merge it into its base"


def _uneven(facts: Inspection) -> Rule:
    uneven = len({(site.rank, site.scale) for site in facts.sites}) > 1 or _states(facts, "scaling", "rslora")
    advice = "fold scales into B, pad to one rank, alpha = rank"
    return uneven, "after export", f"ranks or scales of single layers, or rsLoRA, may be misread: {advice}"


def _states(facts: Inspection, field: str, value: str) -> bool:
    return facts.spec is not None and facts.spec[field] == value


def _kinds(facts: Inspection) -> set[str]:
    return {site.kind for site in facts.sites}


def _last_parts(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def _largest_rank(facts: Inspection) -> int:
    return max(site.rank for site in facts.sites)
