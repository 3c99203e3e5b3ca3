"""The directory of an adapter that no pair can express: its layers' own state, which rankwise alone reads.

PEFT's file names, under a ``peft_type`` that PEFT refuses by name.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from rankwise.algebra.precision import at_least_fp32
from rankwise.base_probe import read_probes
from rankwise.disk import json_bytes, write_files
from rankwise.errors import BrokenFile, MissingTensor, ShapeMismatch, SpecError, UnexpectedTensor, UnsupportedAdapter
from rankwise.files import read_json
from rankwise.format.built import BuiltAdapter, base_layer, layer_tensors
from rankwise.format.names import CONFIG, OWN, TENSORS
from rankwise.layers.kinds import kind_of
from rankwise.methods import name_of
from rankwise.sites import Site, Start, base_modules, variant_generator
from rankwise.spec import LoRA
from rankwise.tensor_files import check_fit, read_tensors, tensor_bytes
from rankwise.variants import VARIANTS
from rankwise.variants.base import AdapterLayer, Variant

T = TypeVar("T")

WHOLE = "modules_to_save."  # stands before the names of tensors that modules trained whole have


def write_own_form(model: nn.Module, adapter: BuiltAdapter, directory: str | Path) -> None:
    """The tensors of each site, the spec, and a probe of the base.

    Raises:
        UnsupportedAdapter: a layer that is built anew would not take the state of the one that was trained.
        NonFiniteTensor: a tensor holds NaN or infinity.
        WriteError: the system refuses. What was there is as it was, on each of these errors.
    """
    folder = Path(directory)
    _check_readable(model, adapter, folder)
    whole = {f"{WHOLE}{key}": tensor for key, tensor in adapter.whole.items()}
    tensors = tensor_bytes(folder / TENSORS, layer_tensors(adapter.layers) | whole)
    content = {
        "peft_type": OWN + name_of(VARIANTS, adapter.spec.variant).upper(),
        "spec": adapter.spec.to_dict(),
        "sites": [asdict(layer.site) for layer in adapter.layers.values()],
        "base_probe": {path: list(values) for path, values in adapter.base_probe.items()},
    }
    write_files(folder, {TENSORS: tensors, CONFIG: json_bytes(content)}, last=CONFIG)


def _check_readable(model: nn.Module, adapter: BuiltAdapter, folder: Path) -> None:
    """What :func:`read_own_form` will build must have the tensors that are written."""
    modules = base_modules(model)
    for path, layer in adapter.layers.items():
        fresh = _fresh_layer(modules, adapter.spec, layer.site, folder).state_dict()
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (layer.state_dict(), fresh)]
        if shapes[0] != shapes[1]:
            misfit = min({name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items())})
            raise UnsupportedAdapter(
                f"{path}: variant {name_of(VARIANTS, adapter.spec.variant)!r} keeps {misfit!r} only after some starts, "
                f"or in another shape, so no file could give it back; expected the same tensors whatever the start"
            )


def read_own_form(model: nn.Module, directory: str | Path) -> BuiltAdapter:
    """The adapter in such a directory, its layers made for ``model``.

    Raises:
        BrokenFile, UnsafeFile, NonFiniteTensor: the files cannot be trusted.
        MissingTensor, UnexpectedTensor, ShapeMismatch, BaseMismatch: the tensors do not fit the spec or the model.
    """
    folder = Path(directory)
    config, tensors = read_json(folder / CONFIG), read_tensors(folder / TENSORS)
    spec, sites, probes = configured(folder / CONFIG, config)
    modules = base_modules(model)
    layers = {path: _fresh_layer(modules, spec, site, folder / TENSORS) for path, site in sites.items()}
    whole = {key.removeprefix(WHOLE): tensors.pop(key) for key in list(tensors) if key.startswith(WHOLE)}
    state = layer_tensors(layers)
    variant = name_of(VARIANTS, spec.variant)
    check_fit(folder / TENSORS, tensors, state, f"variant {variant!r}", "the file is another adapter's, or incomplete")
    for key, tensor in state.items():
        tensor.copy_(tensors[key])
    return BuiltAdapter(spec, layers, whole, probes)


def configured(source: Path, config: Mapping[str, Any]) -> tuple[LoRA, dict[str, Site], dict[str, tuple[float, ...]]]:
    """The spec, the sites by their names, and the probe of the base.

    Raises:
        UnsupportedAdapter: its variant has no row here. BrokenFile: the configuration is another.
    """
    variant = str(config.get("peft_type")).removeprefix(OWN).lower()
    if variant not in VARIANTS:
        raise UnsupportedAdapter(
            f"{source}: holds an adapter of variant {variant!r}, which has no row here; expected one of "
            f"{', '.join(VARIANTS)}: add its row to rankwise.variants.VARIANTS first"
        )
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


def _fresh_layer(modules: Mapping[str, nn.Module], spec: LoRA, site: Site, source: Path) -> AdapterLayer:
    """A new layer of the spec's variant, whose tensors the file's are to replace."""
    layer = base_layer(modules, site.name, source)
    kind, variant = kind_of(layer), spec.variant
    assert isinstance(variant, Variant)
    if (kind.name, kind.shape(layer)) != (site.kind, site.shape):
        raise ShapeMismatch(
            f"{source}: {site.name} is a {site.kind} of {site.shape[0]} × {site.shape[1]} in the file and a "
            f"{kind.name} of {kind.shape(layer)[0]} × {kind.shape(layer)[1]} in this model; it was written for another "
            f"base"
        )
    variant.check_site(site, kind)
    weight = at_least_fp32(kind.weight(layer))
    (out, into), width = site.shape, variant.starting(site).rank
    zeros = Start(weight.new_zeros(width, into), weight.new_zeros(out, width))
    start = variant.adjusted(zeros, variant_generator(spec.seed, site.name), default=True)
    return variant.build(site, kind, weight, start, spec.dropout)
