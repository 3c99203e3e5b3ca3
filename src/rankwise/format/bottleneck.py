"""A bottleneck adapter's directory: PEFT's file names and no LoRA, under a ``peft_type`` that PEFT refuses by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankwise.adapter import base_probes, read_probes
from rankwise.algebra.precision import fp32_or_finer
from rankwise.errors import BaseMismatch, BrokenFile, MissingTensor, NonFiniteTensor, ShapeMismatch, UnexpectedTensor
from rankwise.files import read_json, read_tensors, write_json, write_tensors
from rankwise.format.peft import CONFIG, TENSORS
from rankwise.layers.kinds import kind_or_none
from rankwise.methods import nearest
from rankwise.sites import Site
from rankwise.spec import Bottleneck
from rankwise.variants import AdapterLayer, BottleneckLayer

PEFT_TYPE = "RANKWISE_BOTTLENECK"
T = TypeVar("T")
_TENSORS = ("down.weight", "down.bias", "up.weight", "up.bias")


def write_bottlenecks(
    model: nn.Module, spec: Bottleneck, layers: Mapping[str, AdapterLayer], directory: str | Path
) -> None:
    """``<module path>.down.weight`` … ``.up.bias`` of each site, the spec, and a probe of the base.

    Raises:
        NonFiniteTensor: a tensor holds NaN or infinity; nothing is written.
    """
    folder = Path(directory)
    tensors = {f"{path}.{key}": value for path, layer in layers.items() for key, value in layer.state_dict().items()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteTensor(f"{key} holds NaN or infinity, so {folder} was not written; the training diverged")
    write_tensors(folder / TENSORS, tensors, {})
    probes = {path: list(values) for path, values in base_probes(model, list(layers)).items()}
    write_json(folder / CONFIG, {"peft_type": PEFT_TYPE, "spec": spec.to_dict(), "base_probe": probes})


def read_bottlenecks(
    model: nn.Module, directory: str | Path
) -> tuple[Bottleneck, dict[str, BottleneckLayer], Mapping[str, tuple[float, ...]]]:
    """The spec, a layer for each site of ``model``, and the probe of the base that they were trained on.

    Raises:
        BrokenFile, UnsafeFile, NonFiniteTensor: the files cannot be trusted.
        SpecError: the spec in them is out of range.
        MissingTensor, UnexpectedTensor, ShapeMismatch, BaseMismatch: the tensors do not fit the spec or the model.
    """
    folder = Path(directory)
    config, tensors = read_json(folder / CONFIG), read_tensors(folder / TENSORS)
    try:
        spec = Bottleneck(**config["spec"])
    except (KeyError, TypeError) as error:
        raise BrokenFile(f"{folder / CONFIG}: no bottleneck's spec in it ({error})") from None
    layers = {
        path: _restore(model, spec, path, found, folder / TENSORS)
        for path, found in bottlenecks_by_site(tensors, folder).items()
    }
    return spec, layers, read_probes(folder / CONFIG, config)


def bottlenecks_by_site(tensors: Mapping[str, T], folder: Path) -> dict[str, dict[str, T]]:
    """Module path → name in the layer → tensor, or whatever else is known by the tensors' names.

    Raises:
        MissingTensor, UnexpectedTensor: they make no bottlenecks.
    """
    found: dict[str, dict[str, T]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in _TENSORS if key.endswith(f".{s}")), None)
        if suffix is None:
            raise UnexpectedTensor(f"{folder / TENSORS}: {key} is no part of a bottleneck; it is not read")
        found.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = tensor
    for path, parts in found.items():
        missing = [suffix for suffix in _TENSORS if suffix not in parts]
        if missing:
            raise MissingTensor(f"{folder / TENSORS}: {path} has no {missing[0]}; the file is incomplete")
    if not found:
        raise MissingTensor(f"{folder / TENSORS}: holds no tensors; expected a bottleneck for at least one module")
    return found


def _restore(model: nn.Module, spec: Bottleneck, path: str, found: dict[str, Tensor], where: Path) -> BottleneckLayer:
    modules = dict(model.named_modules())
    if path not in modules:
        raise BaseMismatch(f"{where}: has tensors for {path!r}, which this model lacks{nearest(path, modules)}")
    layer: Any = modules[path]
    kind = kind_or_none(layer)
    if kind is None or kind.output_axis != -1:
        raise BaseMismatch(f"{where}: {path} is a {type(layer).__name__} here, which carries no bottleneck")
    site = Site(path, kind.name, kind.shape(layer), spec.width, 1.0)
    dtype = fp32_or_finer(found["up.weight"].dtype)
    built = BottleneckLayer(site, kind, spec.activation, spec.dropout, dtype, layer.weight.device)
    for key, own in built.state_dict().items():
        if own.shape != found[key].shape:
            raise ShapeMismatch(
                f"{where}: {path}.{key} is {tuple(found[key].shape)}, expected {tuple(own.shape)} from width "
                f"{spec.width} and this model's {path}; it was written for another base"
            )
    built.load_state_dict(found)
    return built
