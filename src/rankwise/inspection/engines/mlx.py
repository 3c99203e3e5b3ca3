"""mlx-lm, which reads adapters in a layout of its own, DoRA among them."""

from collections.abc import Iterable

from rankwise.inspection.engines.architectures import nameless_in_mlx
from rankwise.inspection.engines.rules import (
    Case,
    Engine,
    Rule,
    any_adapter,
    biases,
    convolutions,
    dora,
    embeddings,
    no_note,
    own_form,
    relative,
    replaced,
    tied_embeddings,
    tied_heads,
    token_rows,
    uneven,
)


def _dora_embeddings(case: Case) -> Iterable[str]:
    return sorted({*dora(case)} & {*embeddings(case)})


_LOAD = "mlx_lm/tuner/utils.py: load_adapters"
_LAYERS = "mlx_lm/tuner/utils.py: linear_to_lora_layers"

MLX = Engine(
    label="MLX",
    version="mlx-lm 0.32.2",
    format="mlx",
    rules=(
        Rule("layers' own state", "refuses", "only pairs are read", _LOAD, "none", own_form),
        Rule("modules_to_save", "refuses", "tensors beside lora_a, lora_b and m are refused", _LOAD, "merge", replaced),
        Rule("trained biases", "refuses", "tensors beside lora_a, lora_b and m are refused", _LOAD, "merge", biases),
        Rule(
            "trained rows of tokens",
            "refuses",
            "tensors beside lora_a, lora_b and m are refused",
            _LOAD,
            "merge",
            token_rows,
        ),
        Rule(
            "a convolution", "refuses", "there is no layer of pairs for it", f"{_LAYERS}.to_lora", "merge", convolutions
        ),
        Rule(
            "an embedding with DoRA",
            "misreads",
            "its magnitudes are of tokens, where PEFT's are of dimensions",
            "mlx_lm/tuner/dora.py: DoRAEmbedding",
            "merge",
            _dora_embeddings,
        ),
        Rule(
            "an embedding tied to the output head",
            "misreads",
            "the pair changes the head as well",
            "mlx_lm/tuner/lora.py: LoRAEmbedding.as_linear",
            "merge",
            tied_embeddings,
        ),
        Rule("a head tied to the embedding", "refuses", "there is no such layer", _LOAD, "merge", tied_heads),
        Rule(
            "a layer without a name in mlx-lm",
            "refuses",
            "tensors of unknown names are refused",
            _LOAD,
            "merge",
            nameless_in_mlx,
        ),
        Rule("pairs relative to a changed base", "misreads", "the base stays unchanged", _LOAD, "base", relative),
        Rule(
            "ranks or alphas of single layers", "refuses", "one rank and one scale are read", _LAYERS, "rewrite", uneven
        ),
        Rule(
            "a PEFT directory",
            "refuses",
            "adapters.safetensors with transposed lora_a and lora_b is read",
            _LOAD,
            "rewrite",
            any_adapter,
        ),
    ),
    note=no_note,
    start='mlx_lm.generate --model {base} --adapter-path {out} --prompt "..."',
    start_merged='mlx_lm.generate --model {out} --prompt "..."',
)
