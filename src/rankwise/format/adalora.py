"""A directory that PEFT's AdaLoRA wrote, as the plain LoRA adapter that it is. (Ours are written as plain LoRA.)

PEFT keeps λ as ``lora_E`` (r, 1), scales by lora_alpha / (init_r + 1e-5) whatever is left of the rank, and lets the
``rank_pattern`` of its configuration list which triplets were kept.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import MissingTensor, ShapeMismatch, SpecError
from rankwise.format.names import PREFIX

LAMBDA = ".lora_E"


def site_and_suffix(key: str) -> tuple[str, str] | None:
    """Module path and kind of tensor that a name in AdaLoRA's file tells of; None where it is no site's."""
    path, _, suffix = key.rpartition(".")
    return (path.removeprefix(PREFIX), suffix) if suffix in ("lora_A", "lora_B", "lora_E") else None


def as_lora(
    where: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and tensors (or arrays) of the plain LoRA adapter: B diag(λ)·scale and A, alpha = r.

    Raises:
        SpecError: init_r or lora_alpha is not a positive number.
        MissingTensor, ShapeMismatch: the three factors of a site are not there or do not go together.
    """
    alpha, initial = config.get("lora_alpha", 8), config.get("init_r", 12)
    if not all(type(number) in (int, float) and 0 < number < math.inf for number in (alpha, initial)):
        raise SpecError(f"{where}: lora_alpha {alpha!r} and init_r {initial!r}; expected positive numbers")
    scale = alpha / (initial + 1e-5)
    rest = {key: value for key, value in tensors.items() if not key.endswith((".lora_A", ".lora_B", LAMBDA))}
    ranks: dict[str, int] = {}
    for key in tensors:
        if key.endswith(LAMBDA):
            path = key.removesuffix(LAMBDA)
            A, B = _pair(where, path, tensors, scale)
            rest |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
            ranks[f"^{re.escape(path.removeprefix(PREFIX))}"] = A.shape[0]
    plain = {"peft_type": "LORA", "use_rslora": False, "rank_pattern": ranks, "alpha_pattern": dict(ranks)}
    return {**config, **plain}, rest


def _pair(where: Path, path: str, tensors: Mapping[str, Any], scale: float) -> tuple[Any, Any]:
    A, B, E = (tensors.get(f"{path}.{name}") for name in ("lora_A", "lora_B", "lora_E"))
    if A is None or B is None or E is None:
        raise MissingTensor(f"{where}: {path} lacks one of lora_A, lora_B, lora_E; expected all three of AdaLoRA")
    if len(A.shape) != 2 or len(B.shape) != 2 or not A.shape[0] == B.shape[1] == math.prod(E.shape):
        raise ShapeMismatch(
            f"{where}: {path}: lora_A {tuple(A.shape)}, lora_E {tuple(E.shape)} and lora_B {tuple(B.shape)}; "
            f"expected (r, in), (r, 1) and (out, r)"
        )
    B = B * (E.flatten() * scale)
    if A.shape[0] == 0:  # nothing was left here; a pair of zeros says so
        return A.sum(0)[None], B.sum(1)[:, None]
    return A, B
