"""llama.cpp, which reads GGUF alone. What its own converter of PEFT directories does is told as well."""

from rankwise.inspection.engines.architectures import nameless_in_gguf
from rankwise.inspection.engines.rules import (
    Engine,
    Rule,
    adalora,
    any_adapter,
    biases,
    convolutions,
    dora,
    mis_scaled,
    no_note,
    own_form,
    relative,
    replaced,
    rslora,
    tied_embeddings,
    tied_heads,
    token_rows,
)

_READER = "src/llama-adapter.cpp: llama_adapter_lora_init_impl"
_CONVERTER = "convert_lora_to_gguf.py: LoraModel"

# What GGUF adapters cannot say, for whichever engine reads them.
GGUF_LIMITS = (
    Rule("layers' own state", "refuses", "adapter.type is lora or nothing", _READER, "none", own_form),
    Rule(
        "DoRA",
        "refuses",
        "only pairs are read, and its magnitudes are none",
        f"{_CONVERTER}.get_tensors",
        "nearest",
        dora,
    ),
    Rule("modules_to_save", "refuses", "a tensor of no pair is unexpected", _READER, "merge", replaced),
    Rule("trained biases", "refuses", "a tensor of no pair is unexpected", _READER, "merge", biases),
    Rule("trained rows of tokens", "refuses", "a tensor of no pair is unexpected", _READER, "merge", token_rows),
    Rule(
        "a convolution",
        "refuses",
        "only matrices are multiplied",
        "src/llama-graph.cpp: build_lora_mm",
        "merge",
        convolutions,
    ),
    Rule(
        "an embedding tied to the output head",
        "refuses",
        "the head is the same tensor, to which the pair is applied too, in another shape: it aborts",
        "src/llama-graph.cpp: build_lora_mm; src/llama-adapter.cpp: get_weight",
        "merge",
        tied_embeddings,
    ),
    Rule(
        "a head tied to the embedding",
        "refuses",
        "output.weight is not in the base's file",
        f"{_CONVERTER}.modify_tensors",
        "merge",
        tied_heads,
    ),
    Rule(
        "a layer without a name in GGUF",
        "refuses",
        "its tables of names have no such layer in this architecture",
        "gguf/tensor_mapping.py: TensorNameMap",
        "merge",
        nameless_in_gguf,
    ),
    Rule(
        "pairs relative to a changed base",
        "misreads",
        "init_lora_weights is not read, so the base stays unchanged",
        _CONVERTER,
        "base",
        relative,
    ),
)

LLAMA_CPP = Engine(
    label="llama.cpp",
    version="b11434",
    format="gguf",
    rules=(
        *GGUF_LIMITS,
        Rule("rsLoRA", "mis-scales", "its converter does not read use_rslora", _CONVERTER, "rewrite", rslora),
        Rule(
            "alphas of single layers",
            "mis-scales",
            "its converter writes one alpha for all",
            f"{_CONVERTER}.set_gguf_parameters",
            "rewrite",
            mis_scaled(lambda site_rank, rank, alpha: alpha / site_rank),
        ),
        Rule("AdaLoRA", "refuses", "its converter knows no lora_E", f"{_CONVERTER}.get_tensors", "rewrite", adalora),
        Rule("a PEFT directory", "refuses", "only GGUF is read", _READER, "rewrite", any_adapter),
    ),
    note=no_note,
    start="llama-server --model base.gguf --lora {out}/adapter.gguf  # base.gguf: convert_hf_to_gguf.py {base}",
    start_merged="python convert_hf_to_gguf.py {out} --outfile model.gguf && llama-server --model model.gguf",
)
