"""How the layers of a transformers model are called in GGUF and in mlx-lm. One line an architecture."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rankwise.errors import UnsupportedAdapter
from rankwise.inspection.engines.rules import WHOLE_ADAPTER, BaseFacts, Case


@dataclass(frozen=True)
class Architecture:
    """One architecture, under the other names that it has.

    Attributes:
        gguf: its name in GGUF.
        rotated: whether the rows of queries and keys are in another order there: llama.cpp rotates neighbours, where
            transformers rotates halves (``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py``).
        mlx: regular expression → what stands in its place in mlx-lm's name of a layer.
    """

    gguf: str
    rotated: bool = False
    mlx: tuple[str, str] = ("", "")


# transformers' model_type → what it is elsewhere.
ARCHITECTURES = {
    "llama": Architecture("llama", rotated=True),
    "mistral": Architecture("llama", rotated=True),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "gpt2": Architecture("gpt2", mlx=(r"^transformer\.", "model.")),
    "granite": Architecture("granite", rotated=True),
    "olmo2": Architecture("olmo2"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", rotated=True),
    "starcoder2": Architecture("starcoder2"),
}


def gguf_package() -> Any:
    """llama.cpp's own package for its files, which comes with none of the extras of training.

    Raises:
        UnsupportedAdapter: it is not installed.
    """
    try:
        return import_module("gguf")
    except ImportError:
        raise UnsupportedAdapter("GGUF is written with the package gguf, which is not here: pip install gguf") from None


def gguf_names(base: BaseFacts) -> Any:
    """GGUF's table of names for an architecture that is in ours.

    Raises:
        UnsupportedAdapter: see :func:`gguf_package`.
    """
    gguf = gguf_package()
    names = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(names[ARCHITECTURES[base.model_type].gguf], base.layers)


def mlx_name(model_type: str, path: str) -> str:
    """A layer's name in mlx-lm.

    >>> mlx_name("gpt2", "transformer.h.0.attn.c_attn")
    'model.h.0.attn.c_attn'
    """
    return re.sub(*ARCHITECTURES[model_type].mlx, path, count=1)


def nameless_in_gguf(case: Case) -> Iterable[str]:
    """Sites that have no name in GGUF; nothing where the base is not known."""
    if case.base is None:
        return ()
    if case.base.model_type not in ARCHITECTURES:
        return WHOLE_ADAPTER
    names = gguf_names(case.base)
    return [site.name for site in case.facts.sites if names.get_name(site.name) is None]


def nameless_in_mlx(case: Case) -> Iterable[str]:
    """Sites of an architecture whose names in mlx-lm are not known here; nothing where the base is not known."""
    known = case.base is None or case.base.model_type in ARCHITECTURES
    return () if known else WHOLE_ADAPTER
