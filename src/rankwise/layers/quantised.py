"""Weights that are stored in another form than plain floating point numbers: bitsandbytes, torchao."""

import importlib
from copy import copy
from typing import Any

from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.placement import is_sharded
from rankwise.sites import base_modules


def is_quantised(layer: Any) -> bool:
    """Whether the layer's weight is stored in another form than plain floating point numbers."""
    weight = layer.weight.to_local() if is_sharded(layer.weight) else layer.weight
    return not weight.is_floating_point() or type(weight.data) is not Tensor


def dequantised(layer: Any) -> Tensor:
    """A layer's weight in floating point and its own layout; a view of the parameter where it is not quantised."""
    weight = layer.weight
    if not is_quantised(layer):
        plain: Tensor = weight.detach()
        return plain
    backend = type(weight).__module__.partition(".")[0]
    if backend == "bitsandbytes":
        functional = importlib.import_module("bitsandbytes.functional")
        if type(weight).__name__ == "Params4bit":
            return functional.dequantize_4bit(*_four_bit(weight, functional))  # type: ignore[no-any-return]
        scales = layer.state.SCB if weight.SCB is None else weight.SCB  # the first forward moves them
        return functional.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]
    return weight.detach().dequantize()  # type: ignore[no-any-return]


def _four_bit(weight: Any, functional: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight's data and state, as they were before :func:`_is_repacked`."""
    if not _is_repacked(weight):
        return weight.data, weight.quant_state
    data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, copy(weight.quant_state))
    if not state.nested:  # which it leaves transposed
        state.absmax = state.absmax.T.reshape(-1).float()
    return data, state


def _is_repacked(weight: Any) -> bool:
    return bool(vars(weight.quant_state).get("packing_format_for_cpu"))


def forbid_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit weights in the form that gradients pass through.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 rewrites them for inference at the first forward in evaluation mode: the
    scales are rounded to bf16, and no gradient reaches what lies below from then on.

    Raises:
        AttachError: that has happened already.
    """
    for path, module in base_modules(model).items():
        if ("bitsandbytes.nn.modules", "Linear4bit") not in {(c.__module__, c.__name__) for c in type(module).__mro__}:
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        if _is_repacked(layer.weight):
            raise AttachError(
                f"{path}: bitsandbytes has rewritten this 4-bit weight for inference on this CPU, and no gradient "
                f"passes it any more; load the base again, and attach or collect gradients before a forward in "
                f"evaluation mode"
            )
