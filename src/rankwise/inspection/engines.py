"""Which engines read an adapter right as it stands, and what to do for the others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Answer = Literal["yes", "after export", "no"]

_OWN, _ADALORA = "RANKWISE_", "ADALORA"
_HEADS = ("lm_head", "embed_out", "output_projection")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_OLLAMA_FAMILIES = ("llama", "mistral", "gemma")


@dataclass(frozen=True)
class Traits:
    """What of an adapter matters to engines.

    Attributes:
        peft_type: of its configuration.
        base_model: as its configuration names it.
        sites: module path → kind.
        rank: the largest.
        even: one rank and one scale everywhere, and no pattern in the configuration.
        rslora, dora: of its configuration.
        replaced: the modules that it replaces whole.
    """

    peft_type: str
    base_model: str
    sites: Mapping[str, str]
    rank: int
    even: bool
    rslora: bool
    dora: bool
    replaced: tuple[str, ...]

    def last_parts(self) -> set[str]:
        """Last parts of the sites' names."""
        return {path.rpartition(".")[2] for path in self.sites}


@dataclass(frozen=True)
class Verdict:
    """Whether an engine reads an adapter right, and why or how."""

    engine: str
    answer: Answer
    reason: str


Rule = tuple[Callable[[Traits], bool], Answer, Callable[[Traits], str] | str]


def _always(traits: Traits) -> bool:
    return True


def _foreign_modules(traits: Traits) -> bool:
    return any(path.rpartition(".")[2] not in ("classifier", "score") for path in traits.replaced)


def _vllm_rank(traits: Traits) -> int:
    return min(rank for rank in _VLLM_RANKS if rank >= traits.rank)


# The rules that hold for every engine but PEFT; a rule below one that applies is not asked.
_SHARED: tuple[Rule, ...] = (
    (lambda t: t.peft_type.startswith(_OWN), "no", "its layers' own state, which rankwise alone reads: load it there"),
    (lambda t: t.dora, "no", "DoRA's magnitudes are not read: merge it into its base"),
    (lambda t: "conv2d" in t.sites.values(), "no", "convolutions are not read: merge it into its base"),
    (lambda t: t.peft_type == _ADALORA, "after export", "load it here and save it: that writes plain LoRA"),
)
_UNEVEN: Rule = (
    lambda t: not t.even or t.rslora,
    "after export",
    "ranks or scales of single layers, or rsLoRA, may be misread: fold scales into B, pad to one rank, alpha = rank",
)
_WHOLE: Rule = (
    lambda t: bool(t.replaced),
    "no",
    "modules that are replaced whole are not read: merge it into its base",
)
_EMBEDDINGS: Rule = (
    lambda t: "embedding" in t.sites.values() or not t.last_parts().isdisjoint(_HEADS),
    "no",
    "adapters on embeddings or the output head are not read: merge it into its base",
)

ENGINES: dict[str, tuple[Rule, ...]] = {
    "rankwise": ((_always, "yes", ""),),
    "PEFT": (
        (
            lambda t: t.peft_type.startswith(_OWN),
            "no",
            "its layers' own state, which rankwise alone reads: load it there",
        ),
        (_always, "yes", ""),
    ),
    "vLLM": (
        *_SHARED,
        (_foreign_modules, "no", "replaced modules other than classifier or score are not read: merge it"),
        (
            lambda t: t.rank > _VLLM_RANKS[-1],
            "no",
            f"ranks above {_VLLM_RANKS[-1]} are refused: merge it into its base",
        ),
        _UNEVEN,
        (lambda t: t.rank > 16, "yes", lambda t: f"start it with --max-lora-rank {_vllm_rank(t)} (its default is 16)"),
        (_always, "yes", ""),
    ),
    "SGLang": (
        *_SHARED,
        _WHOLE,
        _UNEVEN,
        (_always, "yes", lambda t: f"declare --max-lora-rank {t.rank} and the target modules up front"),
    ),
    "llama.cpp": (
        *_SHARED,
        _WHOLE,
        _EMBEDDINGS,
        _UNEVEN,
        (_always, "after export", "convert it to GGUF (convert_lora_to_gguf.py)"),
    ),
    "Ollama": (
        *_SHARED,
        _WHOLE,
        _EMBEDDINGS,
        _UNEVEN,
        (
            lambda t: any(family in t.base_model.lower() for family in _OLLAMA_FAMILIES),
            "yes",
            "an ADAPTER line with this directory",
        ),
        (_always, "after export", "of this family only GGUF is read: convert it (convert_lora_to_gguf.py)"),
    ),
    "MLX": (
        *_SHARED,
        _WHOLE,
        _UNEVEN,
        (_always, "after export", "it reads adapters.safetensors with transposed lora_a and lora_b"),
    ),
}


def verdicts(traits: Traits) -> tuple[Verdict, ...]:
    """Each engine's, by the first of its rules that applies."""
    return tuple(_verdict(engine, rules, traits) for engine, rules in ENGINES.items())


def _verdict(engine: str, rules: tuple[Rule, ...], traits: Traits) -> Verdict:
    answer, reason = next((answer, reason) for applies, answer, reason in rules if applies(traits))
    return Verdict(engine, answer, reason if isinstance(reason, str) else reason(traits))
