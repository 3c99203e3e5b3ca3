"""SGLang, which reads PEFT directories."""

from collections.abc import Iterable

from rankwise.inspection.engines.rules import (
    Case,
    Engine,
    Rule,
    adalora,
    biases,
    convolutions,
    dora,
    largest_rank,
    mis_scaled,
    other_ranks,
    own_form,
    regular_expression,
    relative,
    replaced,
    rslora,
    token_rows,
    without,
)

# Layers that it stacks to one: which of them it cannot do without, where it has the one on the left.
STACKED = {"q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",), "up_proj": ("gate_proj",)}


def _incomplete(case: Case) -> Iterable[str]:
    return [path for name, needed in STACKED.items() for path in without(name, needed)(case)]


def _note(case: Case) -> str:
    return f"declare --max-lora-rank {largest_rank(case)} and the target modules up front"


_ADAPTER = "sglang/srt/lora/lora.py: LoRAAdapter"
_MANAGER = "sglang/srt/lora/lora_manager.py: LoRAManager"

SGLANG = Engine(
    label="SGLang",
    version="0.5.23",
    format="peft",
    rules=(
        Rule(
            "layers' own state", "refuses", "peft_type is asserted to be LORA", f"{_ADAPTER}.__init__", "none", own_form
        ),
        Rule("DoRA", "refuses", "use_dora is not supported", f"{_MANAGER}.validate_new_adapter", "nearest", dora),
        Rule(
            "modules_to_save",
            "drops",
            "tensors of no layer and no target are skipped without a word",
            f"{_ADAPTER}._process_weight",
            "merge",
            replaced,
        ),
        Rule(
            "trained biases",
            "refuses",
            "a layer's tensor that is no lora_A is taken for lora_B, and does not fit",
            "sglang/srt/lora/mem_pool.py: LoRAMemoryPool.load_lora_weight_to_buffer",
            "merge",
            biases,
        ),
        Rule(
            "trained rows of tokens",
            "drops",
            "tensors of no layer and no target are skipped without a word",
            f"{_ADAPTER}._process_weight",
            "merge",
            token_rows,
        ),
        Rule(
            "a convolution",
            "refuses",
            "its buffers hold matrices",
            "sglang/srt/lora/mem_pool.py: LoRAMemoryPool.load_lora_weight_to_buffer",
            "merge",
            convolutions,
        ),
        Rule(
            "pairs relative to a changed base",
            "misreads",
            "init_lora_weights is not read, so the base stays unchanged",
            "sglang/srt/lora/lora_config.py: LoRAConfig",
            "base",
            relative,
        ),
        Rule("AdaLoRA", "refuses", "peft_type is asserted to be LORA", f"{_ADAPTER}.__init__", "fold", adalora),
        Rule(
            "some of a stack's layers alone",
            "refuses",
            "q, k and v, and gate and up, are stacked; v with q, q with v, and gate with up are taken for granted",
            f"{_ADAPTER}.normalize_qkv_proj, normalize_gate_up_proj",
            "base",
            _incomplete,
        ),
        Rule(
            "ranks of single layers",
            "refuses",
            "rank_pattern is not read, and a buffer of the configuration's rank does not fit the tensor",
            "sglang/srt/lora/mem_pool.py: LoRAMemoryPool.load_lora_weight_to_buffer",
            "fold",
            other_ranks,
        ),
        Rule(
            "a regular expression as target_modules",
            "refuses",
            "a list of names is expected",
            f"{_MANAGER}.init_lora_shapes",
            "fold",
            regular_expression,
        ),
        Rule(
            "rsLoRA", "mis-scales", "use_rslora is not read: it takes alpha / r", f"{_ADAPTER}.__init__", "fold", rslora
        ),
        Rule(
            "alphas of single layers",
            "mis-scales",
            "alpha_pattern is not read: it takes alpha / r",
            f"{_ADAPTER}.__init__",
            "fold",
            mis_scaled(lambda site_rank, rank, alpha: alpha / rank),
        ),
    ),
    note=_note,
    start="python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
    "--lora-paths adapter={out}",
    start_merged="python -m sglang.launch_server --model-path {out}",
)
