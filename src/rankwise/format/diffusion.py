"""LoRA files of image generators: one safetensors file with the adapters of several models, the *components*.

kohya's sd-scripts      lora_unet_down_blocks_0_attn_to_q.lora_down.weight, .lora_up.weight, .alpha
diffusers               unet.down_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight
diffusers, earlier      ….to_q.lora.down.weight, ….lora_linear_layer.down.weight, ….processor.to_q_lora.down.weight

down is A, [r, in] or [r, in, kh, kw], and up is B, [out, r] or [out, r, 1, 1]; s = alpha / r, or 1 without an alpha.
kohya writes underscores for dots; which of them were dots, only the models' own names tell.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.adapter import Adapter, SiteAdapter, targets_among
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.errors import MissingTensor, ShapeMismatch, SpecError, UnexpectedTensor, UnsupportedAdapter
from rankwise.format.names import BASE_COPY
from rankwise.json_object import as_object
from rankwise.patterns import pattern_values
from rankwise.scaling import declared
from rankwise.sites import base_modules
from rankwise.spec import LoRA
from rankwise.tensor_files import read_metadata, read_tensors, write_tensors

_KOHYA = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
_DIFFUSERS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".alpha": "alpha",
}
_PROCESSOR = re.compile(r"\.processor\.(to_[a-z]+)_lora\.(?=(down|up)\.weight$)")
_METADATA = "lora_adapter_metadata"

# Component → module path → "A", "B" or "alpha" → tensor.
Parts = dict[str, dict[str, dict[str, Tensor]]]


def read_kohya(path: str | Path, models: Mapping[str, nn.Module | Iterable[str]]) -> dict[str, Adapter]:
    """The adapters in a file of kohya's layout, by their components.

    Args:
        path: the file.
        models: component, which is what a name begins with (``"lora_unet"``, ``"lora_te"``), → the model, or the paths
            of its modules.

    Raises:
        UnexpectedTensor: a tensor is of no layer of these models, or a second one for its place.
        UnsupportedAdapter: a layer is no plain LoRA (LoHa, LoKr, DoRA, a Tucker decomposition).
        MissingTensor, ShapeMismatch: two tensors do not make a pair.
        BrokenFile, UnsafeFile, NonFiniteTensor: the file cannot be trusted.
    """
    source = Path(path)
    paths = {component: _module_paths(model) for component, model in models.items()}
    places = {f"{c}_{name.replace('.', '_')}": (c, name) for c, names in paths.items() for name in names}
    parts: Parts = {}
    for key, tensor in read_tensors(source).items():
        stem, _, suffix = key.partition(".")
        if suffix not in _KOHYA:
            raise _no_lora(source, key, _KOHYA)
        if stem not in places:
            raise UnexpectedTensor(f"{source}: {key} is of no layer of {', '.join(models)}; expected their layers only")
        _put(parts, source, key, *places[stem], _KOHYA[suffix], tensor)
    return {c: _adapter(source, found, targets_among(paths[c], list(found)), {}) for c, found in parts.items()}


def write_kohya(adapters: Mapping[str, Adapter], path: str | Path) -> None:
    """Write adapters, by their components, as one file of kohya's layout.

    Raises:
        UnsupportedAdapter: one is more than pairs of linear layers and convolutions. NonFiniteTensor: as it says.
    """
    tensors: dict[str, Tensor] = {}
    for component, name, site in _plain_sites(adapters):
        stem, (A, B) = f"{component}_{name.replace('.', '_')}", _stored(site)
        alpha = torch.tensor(site.delta.scale * site.delta.rank, dtype=torch.float32)
        tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": alpha}
    write_tensors(Path(path), tensors, {})


def read_diffusers(path: str | Path) -> dict[str, Adapter]:
    """The adapters in a file of diffusers' layout, by their components: ``unet``, ``text_encoder``, ``transformer``.

    Raises:
        As :func:`read_kohya`.
    """
    source = Path(path)
    parts: Parts = {}
    for key, tensor in read_tensors(source).items():
        plain = _PROCESSOR.sub(lambda m: f".{'to_out.0' if m[1] == 'to_out' else m[1]}.lora.", key)
        suffix = next((suffix for suffix in _DIFFUSERS if plain.endswith(suffix)), None)
        component, _, name = plain.removesuffix(suffix or "").partition(".")
        if suffix is None or not name:
            raise _no_lora(source, key, _DIFFUSERS)
        _put(parts, source, key, component, name, _DIFFUSERS[suffix], tensor)
    stated = _stated(source)
    return {
        component: _adapter(source, found, tuple(sorted(found)), stated.get(component, {}))
        for component, found in parts.items()
    }


def write_diffusers(adapters: Mapping[str, Adapter], path: str | Path) -> None:
    """Write adapters, by their components, as one file of diffusers' layout.

    Each scale goes into its B, and the ranks of a component are filled up to one with zeros: of a file without alphas,
    diffusers takes the first pair's rank for every pair's alpha.

    Raises:
        As :func:`write_kohya`.
    """
    tensors: dict[str, Tensor] = {}
    for component, adapter in adapters.items():
        rank = max(site.delta.rank for site in adapter.sites.values())
        for _, name, site in _plain_sites({component: adapter}):
            missing = rank - site.delta.rank
            B, A = F.pad(site.delta.B * site.delta.scale, (0, missing)), F.pad(site.delta.A, (0, 0, 0, missing))
            A, B = _stored(replace(site, delta=LowRank(B, A)))
            tensors |= {f"{component}.{name}.lora_A.weight": A, f"{component}.{name}.lora_B.weight": B}
    write_tensors(Path(path), tensors, {})


# ------------------------------------------------------------------------------------------------------------ reading


def _module_paths(model: nn.Module | Iterable[str]) -> list[str]:
    return [path for path in (base_modules(model) if isinstance(model, nn.Module) else model) if path]


def _no_lora(source: Path, key: str, known: Iterable[str]) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"{source}: {key} is of another layout, or of another kind of adapter than LoRA; expected names that end in "
        f"{', '.join(known)}"
    )


def _put(parts: Parts, source: Path, key: str, component: str, name: str, role: str, tensor: Tensor) -> None:
    site = parts.setdefault(component, {}).setdefault(name, {})
    if role in site:
        raise UnexpectedTensor(f"{source}: {key} is a second {role} of {name}; expected one")
    site[role] = tensor


def _stated(source: Path) -> dict[str, dict[str, Any]]:
    """What newer files say of each component in their metadata: fields of PEFT's configuration."""
    text = read_metadata(source).get(_METADATA)
    fields: dict[str, dict[str, Any]] = {}
    for key, value in (as_object(f"{source}: {_METADATA}", text.encode()) if text else {}).items():
        component, _, field = key.partition(".")
        fields.setdefault(component, {})[field] = value
    return fields


def _adapter(
    source: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    targets: str | tuple[str, ...],
    stated: Mapping[str, Any],
) -> Adapter:
    alphas = pattern_values("alpha_pattern", stated.get("alpha_pattern") or {}, list(parts), stated.get("lora_alpha"))
    scaling = declared(bool(stated.get("use_rslora")))
    sites: dict[str, SiteAdapter] = {}
    for name, part in parts.items():
        A, B = _pair(source, name, part)
        alpha = float(part["alpha"]) if "alpha" in part else alphas[name]
        scale = 1.0 if alpha is None else scaling(_positive(source, name, alpha), len(A))
        delta = LowRank(at_least_fp32(B).flatten(1), at_least_fp32(A).flatten(1), scale)
        kernel = tuple(A.shape[1:]) if A.dim() == 4 else ()
        sites[name] = SiteAdapter("conv2d" if kernel else "linear", delta, kernel)
    rank = max(site.delta.rank for site in sites.values())
    return Adapter(LoRA(rank=rank, alpha=rank, target_modules=targets), sites, targets)


def _pair(source: Path, name: str, part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "A" not in part or "B" not in part:
        raise MissingTensor(f"{source}: {name} has {', '.join(part)} alone; expected both halves of the pair")
    A, B = part["A"], part["B"]
    fits = A.dim() == B.dim() and A.dim() in (2, 4) and A.shape[0] == B.shape[1] and prod(B.shape[2:]) == 1
    if not fits or not (A.is_floating_point() and B.is_floating_point()):
        raise ShapeMismatch(
            f"{source}: {name}: {tuple(A.shape)} and {tuple(B.shape)} do not make a pair; expected (r, in) and (out, r)"
        )
    return A, B


def _positive(source: Path, name: str, alpha: Any) -> float:
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise SpecError(f"{source}: {name}: alpha is {alpha!r}; expected a positive number")
    return float(alpha)


# ------------------------------------------------------------------------------------------------------------ writing


def _plain_sites(adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, str, SiteAdapter]]:
    """Component, module path and site, each one that the layouts have a place for."""
    for component, adapter in adapters.items():
        for name, site in adapter.sites.items():
            more = sorted(site.extra.keys() - {BASE_COPY}) + sorted(adapter.saved)
            if more or site.kind == "embedding" or site.groups != 1:
                what = more[0] if more else f"an {site.kind}" if site.groups == 1 else "a grouped convolution"
                raise UnsupportedAdapter(
                    f"{name}: has {what}, for which this layout has no place; expected pairs of linear layers and "
                    f"convolutions: rankwise.algebra.combine makes plain pairs of DoRA"
                )
            yield component, name, site


def _stored(site: SiteAdapter) -> tuple[Tensor, Tensor]:
    """A and B in the files' shapes."""
    A, B = site.delta.A, site.delta.B
    return (A.reshape(-1, *site.kernel), B[:, :, None, None]) if site.kind == "conv2d" else (A, B)
