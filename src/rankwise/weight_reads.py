"""Which weights operators multiply with, whoever calls them: watched by a mode of torch's dispatcher."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

# Sums and norms are not among them: models add 0 · weight.sum() to a loss so that no parameter counts as unused.
_PRODUCTS = {
    *("addmm", "addmv", "baddbmm", "bmm", "convolution", "embedding", "mm", "mv", "_addmm_activation"),
    *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    *("conv2d", "einsum", "inner", "linear", "matmul", "tensordot"),  # inference mode does not take them apart
    *("_to_copy", "to"),  # autocast's, before the product
}


class WeightReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which layers' weights are read by a product, until :meth:`ended`.

    A weight is known by its address, so that views of it count; one that several parameters share is not watched. What
    is made of a weight number by number, such as a copy of it in another type or several weights as one, counts too.

    Attributes:
        supports_higher_order_operators: torch asks for it where attention or a branch is one operator.
        read: paths of the layers whose weights were.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        owners = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
        addresses = {path: layer.weight.data_ptr() for path, layer in layers.items() if type(layer.weight) in _PLAIN}
        self._paths = {address: {path} for path, address in addresses.items() if owners[address] == 1 and address}
        self._made: list[Tensor] = []
        self._model = model
        self.read: set[str] = set()

    def begin(self) -> None:
        """Watch every operator from here on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes nothing and keeps no tensor, so nothing that looks for modes need heed it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weights = {arg for arg in tree_leaves(args) if self._is_watched(arg)}
        result = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] in _PRODUCTS:
            self.read.update(path for weight in weights for path in self._paths[weight.data_ptr()])
        elif weights:
            self._follow(result, weights)
        return result

    def _is_watched(self, arg: Any) -> bool:
        return type(arg) in _PLAIN and arg.layout is torch.strided and arg.data_ptr() in self._paths

    def _follow(self, result: Any, weights: Collection[Tensor]) -> None:
        """Watch a result that may hold a number for each of a weight's; a sum or a norm of them holds fewer."""
        if type(result) in _PLAIN and result.numel() >= max(weight.numel() for weight in weights):
            paths = {path for weight in weights for path in self._paths[weight.data_ptr()]}
            self._paths.setdefault(result.data_ptr(), paths)
            self._made.append(result)  # or its address could become another's

    @staticmethod
    def ended(model: nn.Module) -> "WeightReads | None":
        """End the watch over this model; None where there is none.

        One may be left from a forward that was interrupted from the keyboard.
        """
        mode = _get_current_dispatch_mode()
        if not isinstance(mode, WeightReads) or mode._model is not model:
            return None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return mode


_PLAIN = (Tensor, nn.Parameter)
