"""A site of a directory that PEFT's AdaLoRA wrote, as the plain LoRA pair that it is. (Ours are written as plain LoRA.)

PEFT keeps λ as ``lora_E`` (r, 1), and scales by lora_alpha / (init_r + 1e-5) whatever is left of the rank.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import MissingTensor, ShapeMismatch, SpecError


def as_plain_pair(source: Path, path: str, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A site's tensors (or arrays) by file suffix, with B diag(λ)·scale for B and without λ: of scale 1, so alpha = r.

    Args:
        source: the file, for the error.

    Raises:
        SpecError: init_r or lora_alpha is not a positive number.
        MissingTensor, ShapeMismatch: the three factors are not there or do not go together.
    """
    alpha, initial = config.get("lora_alpha", 8), config.get("init_r", 12)
    if not all(type(number) in (int, float) and 0 < number < math.inf for number in (alpha, initial)):
        raise SpecError(f"{source.parent}: lora_alpha {alpha!r} and init_r {initial!r}; expected positive numbers")
    A, B, E = (tensors.get(name) for name in ("lora_A", "lora_B", "lora_E"))
    if A is None or B is None or E is None:
        raise MissingTensor(f"{source}: {path} lacks one of lora_A, lora_B, lora_E; expected all three of AdaLoRA")
    if len(A.shape) != 2 or len(B.shape) != 2 or not A.shape[0] == B.shape[1] == math.prod(E.shape):
        raise ShapeMismatch(
            f"{source}: {path}: lora_A {tuple(A.shape)}, lora_E {tuple(E.shape)} and lora_B {tuple(B.shape)}; "
            f"expected (r, in), (r, 1) and (out, r)"
        )
    B = B * (E.flatten() * (alpha / (initial + 1e-5)))
    if A.shape[0] == 0:  # pruning left nothing here; a pair of zeros says so
        A, B = A.sum(0)[None], B.sum(1)[:, None]
    rest = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "lora_E"}
    return {**rest, "lora_A": A, "lora_B": B}
