"""The directory of an adapter that no pair can express: its layers' own state, which rankwise alone reads.

PEFT's file names, under a ``peft_type`` that PEFT refuses by name.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankwise.algebra.precision import at_least_fp32
from rankwise.base_probe import read_probes
from rankwise.errors import BrokenFile, MissingTensor, NonFiniteTensor, ShapeMismatch, SpecError, UnexpectedTensor
from rankwise.files import read_json, write_json
from rankwise.format.base_layers import base_layer
from rankwise.format.names import CONFIG, OWN, TENSORS
from rankwise.layers.kinds import kind_of
from rankwise.methods import name_of
from rankwise.sites import Site, Start, base_modules, variant_generator
from rankwise.spec import LoRA
from rankwise.tensor_files import read_tensors, write_tensors
from rankwise.variants import VARIANTS
from rankwise.variants.base import AdapterLayer, Variant

T = TypeVar("T")

WHOLE = "modules_to_save."  # stands before the names of tensors that modules trained whole have


@dataclass(frozen=True, eq=False)
class OwnAdapter:
    """What such a directory holds.

    Attributes:
        layers: site → its layer.
        whole: the tensors of modules trained whole, by their names in the model.
        base_probe: see :class:`rankwise.adapter.Adapter`.
    """

    spec: LoRA
    layers: Mapping[str, AdapterLayer]
    whole: Mapping[str, Tensor]
    base_probe: Mapping[str, tuple[float, ...]]


def write_own_form(adapter: OwnAdapter, directory: str | Path) -> None:
    """``<module path>.<name in the layer>`` of each site, the spec, and a probe of the base.

    Raises:
        NonFiniteTensor: a tensor holds NaN or infinity; nothing is written.
    """
    folder = Path(directory)
    tensors = {
        f"{path}.{key}": value for path, layer in adapter.layers.items() for key, value in layer.state_dict().items()
    }
    tensors |= {f"{WHOLE}{key}": value for key, value in adapter.whole.items()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteTensor(f"{key} holds NaN or infinity, so {folder} was not written; the training diverged")
    write_tensors(folder / TENSORS, tensors, {})
    content = {
        "peft_type": OWN + name_of(VARIANTS, adapter.spec.variant).upper(),
        "spec": adapter.spec.to_dict(),
        "sites": [asdict(layer.site) for layer in adapter.layers.values()],
        "base_probe": {path: list(values) for path, values in adapter.base_probe.items()},
    }
    write_json(folder / CONFIG, content)


def read_own_form(model: nn.Module, directory: str | Path) -> OwnAdapter:
    """The adapter in such a directory, its layers made for ``model``.

    Raises:
        BrokenFile, UnsafeFile, NonFiniteTensor: the files cannot be trusted.
        MissingTensor, UnexpectedTensor, ShapeMismatch, BaseMismatch: the tensors do not fit the spec or the model.
    """
    folder = Path(directory)
    config, tensors = read_json(folder / CONFIG), read_tensors(folder / TENSORS)
    spec, sites, probes = configured(folder / CONFIG, config)
    states = states_by_site(folder / TENSORS, tensors, sites)
    modules = base_modules(model)
    layers = {
        path: _restore(base_layer(modules, path, folder / TENSORS), spec, site, states[path], folder / TENSORS)
        for path, site in sites.items()
    }
    whole = {key.removeprefix(WHOLE): value for key, value in tensors.items() if key.startswith(WHOLE)}
    return OwnAdapter(spec, layers, whole, probes)


def configured(source: Path, config: Mapping[str, Any]) -> tuple[LoRA, dict[str, Site], dict[str, tuple[float, ...]]]:
    """The spec, the sites by their names, and the probe of the base.

    Raises:
        BrokenFile: the configuration is another.
    """
    try:
        spec = LoRA.from_dict(config["spec"])
        sites = {site["name"]: _site(**site) for site in config["sites"]}
    except (KeyError, TypeError, ValueError, SpecError) as error:
        raise BrokenFile(
            f"{source}: expected a rankwise spec and its sites, found none that can be used ({error})"
        ) from None
    if not sites:
        raise BrokenFile(f"{source}: lists no sites; expected one module at least")
    return spec, sites, read_probes(source, config)


def _site(name: str, kind: str, shape: list[int], rank: int, scale: float) -> Site:
    out, into = shape
    numbers = (out, into, rank)
    if not all(type(text) is str for text in (name, kind)) or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"site {name!r}")
    return Site(name, kind, (out, into), rank, float(scale))


def states_by_site(source: Path, tensors: Mapping[str, T], sites: Mapping[str, Any]) -> dict[str, dict[str, T]]:
    """Site → name in its layer → tensor, or whatever else is known by the tensors' names.

    Raises:
        MissingTensor: a site has none. UnexpectedTensor: one is no site's.
    """
    states: dict[str, dict[str, T]] = {path: {} for path in sites}
    for key, tensor in tensors.items():
        path = next((path for path in sites if key.startswith(f"{path}.")), None)
        if path is not None:
            states[path][key.removeprefix(f"{path}.")] = tensor
        elif not key.startswith(WHOLE):
            raise UnexpectedTensor(f"{source}: {key} belongs to no adapter site; it is not read")
    for path, state in states.items():
        if not state:
            raise MissingTensor(f"{source}: no tensors for {path}, which {CONFIG} lists; it is incomplete")
    return states


def _restore(layer: Any, spec: LoRA, site: Site, state: Mapping[str, Tensor], source: Path) -> AdapterLayer:
    """A new layer of the spec's variant, with the file's state in it."""
    path, kind, variant = site.name, kind_of(layer), spec.variant
    assert isinstance(variant, Variant)
    if (kind.name, kind.shape(layer)) != (site.kind, site.shape):
        raise ShapeMismatch(
            f"{source}: {path} is a {site.kind} of {site.shape[0]} × {site.shape[1]} in the file and a {kind.name} of "
            f"{kind.shape(layer)[0]} × {kind.shape(layer)[1]} in this model; it was written for another base"
        )
    variant.check_site(site, kind)
    weight = at_least_fp32(kind.weight(layer))
    (out, into), width = site.shape, variant.starting(site).rank
    zeros = Start(weight.new_zeros(width, into), weight.new_zeros(out, width))
    start = variant.adjusted(zeros, variant_generator(spec.seed, path), default=True)
    built = variant.build(site, kind, weight, start, spec.dropout)
    expected = built.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing:
        raise MissingTensor(f"{source}: {path} has no {missing[0]}; the file is incomplete")
    if unknown:
        raise UnexpectedTensor(f"{source}: {path}.{unknown[0]} is no part of variant {name_of(VARIANTS, variant)!r}")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise ShapeMismatch(
                f"{source}: {path}.{key} is {tuple(tensor.shape)}, expected {tuple(expected[key].shape)}"
            )
    built.load_state_dict(dict(state))
    return built
