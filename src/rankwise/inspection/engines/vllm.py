"""vLLM, which reads PEFT directories."""

from collections.abc import Iterable

from rankwise.inspection.engines.rules import (
    Case,
    Engine,
    Rule,
    above,
    adalora,
    biases,
    convolutions,
    dora,
    embeddings,
    largest_rank,
    own_form,
    patterns,
    relative,
    replaced,
    token_rows,
)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
_DEFAULT_RANK = 16
_CLASSIFIERS = ("classifier", "score")
_EMBEDDINGS = ("embed_tokens", "lm_head")


def _other_whole_modules(case: Case) -> Iterable[str]:
    named = () if case.facts.spec is None else case.facts.spec["modules_to_save"]
    return [name for name in dict.fromkeys((*named, *replaced(case))) if name not in _CLASSIFIERS]


def _other_embeddings(case: Case) -> Iterable[str]:
    return [path for path in embeddings(case) if path.rpartition(".")[2] not in _EMBEDDINGS]


def _note(case: Case) -> str:
    rank = largest_rank(case)
    limit = next((limit for limit in RANKS if limit >= rank), rank)
    return f"start it with --max-lora-rank {limit} (its default is {_DEFAULT_RANK})" if rank > _DEFAULT_RANK else ""


_HELPER = "vllm/lora/peft_helper.py: PEFTHelper"

VLLM = Engine(
    label="vLLM",
    version="0.33.0",
    format="peft",
    rules=(
        Rule(
            "layers' own state",
            "refuses",
            "its tensors' names are not those of pairs",
            "vllm/lora/utils.py: parse_fine_tuned_lora_name",
            "none",
            own_form,
        ),
        Rule("DoRA", "refuses", "use_dora is not supported", f"{_HELPER}._validate_features", "nearest", dora),
        Rule(
            "modules_to_save",
            "refuses",
            "no module is replaced whole, but a classifier called classifier or score",
            f"{_HELPER}._validate_features",
            "merge",
            _other_whole_modules,
        ),
        Rule("trained biases", "refuses", "bias must be none", f"{_HELPER}.validate_legal", "merge", biases),
        Rule(
            "trained rows of tokens",
            "refuses",
            "their tensors' names are not those of pairs",
            "vllm/lora/utils.py: parse_fine_tuned_lora_name",
            "merge",
            token_rows,
        ),
        Rule(
            "a convolution",
            "refuses",
            "only linear layers and embeddings carry adapters",
            "vllm/lora/utils.py: get_supported_lora_modules",
            "merge",
            convolutions,
        ),
        Rule(
            "an embedding other than embed_tokens or lm_head",
            "refuses",
            "no model names it among its embedding_modules",
            "vllm/lora/utils.py: get_supported_lora_modules",
            "merge",
            _other_embeddings,
        ),
        Rule(
            f"a rank above {RANKS[-1]}",
            "refuses",
            "--max-lora-rank goes no higher",
            "vllm/config/lora.py: MaxLoRARanks",
            "nearest",
            above(RANKS[-1]),
        ),
        Rule(
            "pairs relative to a changed base",
            "refuses",
            "init_lora_weights of PiSSA and OLoRA is not supported",
            f"{_HELPER}._init_is_supported",
            "base",
            relative,
        ),
        Rule(
            "AdaLoRA",
            "refuses",
            "lora_E is no name of a pair",
            "vllm/lora/utils.py: parse_fine_tuned_lora_name",
            "fold",
            adalora,
        ),
        Rule(
            "ranks or alphas of single layers",
            "mis-scales",
            "releases before rank_pattern and alpha_pattern were read take one scale for all; this one reads them",
            f"{_HELPER}.get_rank_and_scaling",
            "fold",
            patterns,
        ),
    ),
    note=_note,
    start="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={out}",
    start_merged="vllm serve {out}",
)
