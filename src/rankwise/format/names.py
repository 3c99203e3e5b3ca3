"""The names in an adapter's directory: of its files, and of the tensors in them."""

import re

CONFIG, TENSORS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "rankwise.json"
FILES = TENSORS, EXTRA, CONFIG  # in the order in which they are written
FORMAT_VERSION = 1  # of EXTRA
OWN = "RANKWISE_"  # begins the ``peft_type`` of an adapter that no pair expresses, which PEFT refuses by that name

PREFIX = "base_model.model."  # before a module's path
PAIR, EMBEDDING_PAIR = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
BASE_COPY = "base_layer"  # PEFT saves an adapted embedding's own weight along
_KEY = re.compile(rf"(?P<path>.+)\.(?P<suffix>lora_\w+|{BASE_COPY})(\.weight)?$")


def site_and_suffix(key: str) -> tuple[str, str] | None:
    """Module path and kind of tensor that a name in the file tells of; None where it is no site's."""
    match = _KEY.match(key.removeprefix(PREFIX))
    return None if match is None else (match["path"], match["suffix"])
