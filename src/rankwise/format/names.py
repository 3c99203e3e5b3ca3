"""The names in an adapter's directory: of its files, and of the tensors in them."""

import re

CONFIG, TENSORS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "rankwise.json"
FILES = TENSORS, EXTRA, CONFIG  # in the order in which they are written
FORMAT_VERSION = 1  # of EXTRA
OWN = "RANKWISE_"  # begins the ``peft_type`` of an adapter that no pair expresses, which PEFT refuses by that name

PREFIX = "base_model.model."  # before a module's path
PAIR, EMBEDDING_PAIR = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"  # below an embedding: rows that are trained
BASE_COPY = "base_layer"  # PEFT saves an adapted embedding's own weight along
# Modules whose weights PEFT saves whole without being told, where the vocabulary was resized.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings")
_TOKENS = "token_adapter"  # PEFT's wrapper of an embedding whose rows are trained
_TRAINED, _ORIGINAL = "modules_to_save", "original_module"  # what PEFT's wrapper of a module trained whole holds
_EITHER = ("lora_magnitude_vector",)  # with and without ".weight"
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<suffix>lora_\w+)(?P<weight>\.weight)?")
_COPY = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.{BASE_COPY}\.(?P<rest>weight|bias)")


def site_and_suffix(key: str, *, bare_pairs: bool = False) -> tuple[str, str] | None:
    """Module path and kind of tensor that a name in the file tells of; None where it is no site's, as PEFT spells it.

    Args:
        bare_pairs: whether ``lora_A`` and ``lora_B`` are tensors, as AdaLoRA has them, and not modules with a weight.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    suffix = match["suffix"]
    spelt = suffix in _EITHER or bool(match["weight"]) == (suffix in PAIR and not bare_pairs)
    return (match["path"], suffix) if spelt else None


def whole_name(key: str) -> str | None:
    """The name in the model of a tensor that a file has whole; None of an original that a trained copy stands beside.

    >>> whole_name("base_model.model.score.weight")
    'score.weight'
    >>> whole_name("base_model.model.head.classifier.modules_to_save.default.0.weight")
    'head.classifier.0.weight'
    """
    parts = key.removeprefix(PREFIX).split(".")
    if _TOKENS in parts and not is_token_rows(key):  # what PEFT saves along where the vocabulary was resized
        place = parts.index(_TOKENS)
        return ".".join(parts[:place] + parts[place + 2 :]) if parts[place + 1] == BASE_COPY else None
    if copy := _COPY.fullmatch(key):
        return f"{copy['path']}.{copy['rest']}"
    if _TRAINED in parts:
        place = parts.index(_TRAINED)
        named = parts[place + 1 : place + 2] == ["default"]  # an adapter's name
        del parts[place : place + 1 + named]
    return None if _ORIGINAL in parts else ".".join(parts)


def is_token_rows(key: str) -> bool:
    """Whether a name is that of rows of an embedding that are trained."""
    return key.endswith(f".{TOKEN_ROWS}")


def is_base_copy(key: str) -> bool:
    """Whether a name in the file is that of an adapted layer's own tensor."""
    return _COPY.fullmatch(key) is not None


def is_embedding(key: str) -> bool:
    """Whether a tensor's name is that of a weight or bias of an embedding or an output head."""
    path, _, last = key.rpartition(".")
    return last in ("weight", "bias") and path.rpartition(".")[2] in EMBEDDINGS
