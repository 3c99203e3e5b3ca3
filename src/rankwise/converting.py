"""convert: what an adapter of any of PEFT's kinds does to a base's weights, as a plain LoRA."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximation import Approximation
from rankwise.base_weights import tensors_of
from rankwise.errors import UnsupportedAdapter
from rankwise.extracting import extract
from rankwise.files import read_json, tensor_entries
from rankwise.format.names import CONFIG, TENSORS
from rankwise.layers.kinds import kind_or_none
from rankwise.layers.quantised import is_quantised
from rankwise.sites import base_modules

_INSIDE = "base_model.model."  # where a PeftModel keeps the model


def convert(
    directory: str | Path, base: nn.Module, rank: int | None = None, error: float | None = None, *, seed: int = 0
) -> Approximation:
    """The nearest LoRA to an adapter that PEFT trained on ``base``: LoHa, LoKr, OFT, BOFT, IA³, VeRA, DoRA and others.

    Each layer's change is what PEFT's own merge makes of its weight, one layer at a time; ``base`` stays as it is.
    What no LoRA holds (a changed bias) is named, modules that were trained whole are taken whole.

    Args:
        directory: a PEFT directory.
        base: the model that the adapter was trained on.
        rank: of every site, where fewer ranks do not hold its change whole.
        error: or the largest error of each site, each with as few ranks as it takes.
        seed: of the randomised decompositions.

    Returns:
        The adapter, at each site ‖change − ΔW‖/‖change‖, and ``left_out``.

    Raises:
        UnsupportedAdapter: PEFT is not installed, does not read or merge this kind, or it changes no weight; or the
            base is quantised.
        SpecError: not exactly one of rank and error.
        BrokenFile, UnsafeFile: the directory cannot be trusted.
    """
    folder = Path(directory)
    tensor_entries(folder / TENSORS)  # a pickle is refused, where PEFT would open it
    kind = read_json(folder / CONFIG).get("peft_type")
    for path, layer in base_modules(base).items():
        if kind_or_none(layer) is not None and is_quantised(layer):
            raise UnsupportedAdapter(f"{path}: is quantised, and merging would round the change; load the base in full")
    merged = _MergedTensors(base, folder, str(kind))
    return extract(merged, base, rank, error, modules_to_save=merged.modules_to_save, seed=seed)


class _MergedTensors(Mapping[str, Tensor]):
    """The base's tensors by name as PEFT merges an adapter into them, each when it is asked for."""

    def __init__(self, base: nn.Module, folder: Path, kind: str) -> None:
        try:
            from peft import PeftModel
            from peft.tuners.tuners_utils import BaseTunerLayer
            from peft.utils.other import ModulesToSaveWrapper
        except ImportError:
            raise UnsupportedAdapter(
                f"{folder}: an adapter of kind {kind!r} is read by PEFT, which is not here: pip install peft"
            ) from None
        self.folder, self.kind = folder, kind
        self.tensors = dict(tensors_of(base))
        # The copy shares the base's memory: nothing is merged into it, only into copies of single layers.
        shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
        try:
            model: Any = PeftModel.from_pretrained(copy.deepcopy(base, shared), folder)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UnsupportedAdapter(f"{folder}: PEFT does not read it for this base ({error})") from None
        _read_in_fp32(model, {id(parameter) for parameter in shared.values()}, folder)
        modules = {name.removeprefix(_INSIDE): module for name, module in model.named_modules()}
        self.layers = {path: module for path, module in modules.items() if isinstance(module, BaseTunerLayer)}
        if not self.layers:
            raise UnsupportedAdapter(
                f"{folder}: {kind!r} changes no layer's weight; expected a kind that PEFT can merge"
            )
        for path, module in modules.items():
            if isinstance(module, ModulesToSaveWrapper):
                trained = module.modules_to_save[model.active_adapter].state_dict()
                self.tensors |= {f"{path}.{name}": tensor for name, tensor in trained.items()}
        self.modules_to_save = tuple(getattr(model.peft_config[model.active_adapter], "modules_to_save", None) or ())

    def __getitem__(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        if path not in self.layers:
            return self.tensors[name]
        layer = copy.deepcopy(self.layers[path])
        if self.tensors[name].dtype.itemsize < 4:
            layer = layer.float()  # bf16 would swallow most of a small change
        try:
            with torch.no_grad():
                layer.merge()
        except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
            raise UnsupportedAdapter(
                f"{self.folder}: {path}: PEFT does not merge {self.kind!r} into this layer ({error}); leave the layer "
                f"out of the adapter"
            ) from None
        tensor: Tensor = getattr(layer.get_base_layer(), last).detach()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _read_in_fp32(model: Any, of_base: set[int], folder: Path) -> None:
    """Read the adapter's tensors again: beside a base of half precision PEFT has rounded them to it."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4 and id(parameter) not in of_base:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(model, load_peft_weights(str(folder)))
