"""When a tensor may be written into: not under transforms, nor where something else may hold it."""

import torch
from torch import Tensor, nn
from torch._C import _autograd, _functorch
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_transformed() -> bool:
    """Whether the forward must be plain operators: for compiler and tracer, torch.func, forward-mode differentiation.

    And for a mode that keeps operators' results, such as selective checkpointing.
    """
    return (
        torch.compiler.is_compiling()  # which fuses and plans memory itself
        or torch._C._get_tracing_state() is not None
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode(include_infra_modes=False)
    )


# Whose forwards return a new tensor and keep nothing of it.
_RETURNS_NEW = {"torch.nn.modules.linear", "transformers.pytorch_utils", "bitsandbytes.nn.modules"}


def writable(layer: nn.Module, y: Tensor) -> Tensor:
    """What the layer returned, or a copy unless the one forward hook that calls this is all that can hold it.

    Another forward, a hook or a mode that sees tensors may keep y, or have saved it for its backward pass. And autograd
    lets nobody write into a view made inside a custom Function, as bitsandbytes' int8 layers return.
    """
    alone = (
        type(layer).forward.__module__ in _RETURNS_NEW
        and "forward" not in vars(layer)
        and len(layer._forward_hooks) == 1
        and not _global_forward_hooks
        and not torch._C._len_torch_function_stack()
        and not (y._is_view() and _autograd._get_creation_meta(y) != _autograd.CreationMeta.DEFAULT)
    )
    return y if alone else y.clone()
