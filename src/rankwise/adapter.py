"""Adapter: the portable value of a trained adapter, its spec and each site's tensors, without a model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.algebra.low_rank import LowRank
from rankwise.base_probe import PROBED
from rankwise.layers.kinds import kind_of
from rankwise.layers.quantised import is_quantised
from rankwise.patterns import keys_under, names_by_end
from rankwise.placement import whole_tensor
from rankwise.shapes import Int
from rankwise.sites import base_modules
from rankwise.spec import LoRA
from rankwise.variants.base import FoldableLayer


@dataclass(frozen=True, eq=False)
class SiteAdapter:
    """One site's part of an adapter.

    Attributes:
        kind: "linear" (a file cannot tell it from "conv1d"), "conv1d", "conv2d" or "embedding".
        delta: ΔW = scale · B A with B [out, r], A [r, in].
        kernel: the axes that ``in`` unfolds to, (in/groups, kh, kw) for a convolution, else ().
        groups: of a grouped convolution.
        extra: other tensors that the variant saves, by file suffix.
        unlike_peft: what PEFT's layer for a convolution leaves out and so computes another function; "" if nothing.
    """

    kind: str
    delta: LowRank
    kernel: tuple[int, ...] = ()
    groups: int = 1
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    unlike_peft: str = ""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole adapter.

    Attributes:
        spec: what made it; for a file that another library wrote, what its configuration says.
        sites: module path → its part.
        targets: the shortest list of module names that selects exactly these sites on the base they came from, or a
            regular expression where no list does, or the base is not known.
        base_probe: module path → 16 evenly spaced base weights, by which another base is recognised.
        base_quantised: whether those weights were dequantised ones, which stand for others.
        base_model: name or path of the base, where known.
        task_type: PEFT's word for what the base does, such as "CAUSAL_LM"; None where it has none.
        saved: the tensors of ``modules_to_save``, by their names in the model's state dict.
    """

    spec: LoRA
    sites: Mapping[str, SiteAdapter]
    targets: str | tuple[str, ...]
    base_probe: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    base_model: str | None = None
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    base_quantised: bool = False
    task_type: str | None = None


def extract(model: nn.Module, spec: LoRA, layers: Mapping[str, FoldableLayer], saved: Mapping[str, Tensor]) -> Adapter:
    """The adapter that these layers of ``model``, and its modules saved whole, are, detached from it (CPU tensors)."""
    stored = {path: _site_adapter(model.get_submodule(path), layer) for path, layer in layers.items()}
    sites = {path: site for path, site in stored.items() if site.delta.rank}  # pruning may have left nothing of one
    config = getattr(model, "config", None)
    return Adapter(
        spec,
        sites,
        targets_among(base_modules(model), list(sites)),
        base_probes(model, list(sites)),
        getattr(config, "_name_or_path", None) or None,
        {key: _cpu_copy(value) for key, value in saved.items()},
        any(is_quantised(model.get_submodule(path)) for path in sites),
        task_type(model, saved),
    )


# How transformers' classes end → PEFT's word for their task, and the heads that PEFT then trains whole, told or not.
_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def task_type(model: nn.Module, saved: Iterable[str]) -> str | None:
    """PEFT's word for what a model does, by its class; None where PEFT would look for a head that is not saved.

    Args:
        saved: names of the tensors that the file has whole.
    """
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"
    task, heads = next((_TASKS[end] for end in _TASKS if name.endswith(end)), (None, ()))
    present = [head for head in heads if head in dict(model.named_children())]
    return task if keys_under(present, saved) or not heads else None


def _site_adapter(layer: nn.Module, adapter: FoldableLayer) -> SiteAdapter:
    with torch.no_grad():
        delta = adapter.delta()
        extra = {suffix: _cpu_copy(tensor) for suffix, tensor in adapter.extra_tensors().items()}
    on_cpu = LowRank(_cpu_copy(delta.B), _cpu_copy(delta.A), delta.scale)
    kernel, groups = adapter.kind.kernel(layer), adapter.kind.groups(layer)
    return SiteAdapter(adapter.kind.name, on_cpu, kernel, groups, extra, unlike_peft(layer))


def unlike_peft(layer: nn.Module) -> str:
    """What PEFT's layer for a convolution leaves out of it; "" where it computes the same.

    Its ``lora_A`` is a convolution with the same kernel, stride and padding, but pads with zeros and has no dilation.

    >>> unlike_peft(nn.Conv2d(2, 2, 3, dilation=2)), unlike_peft(nn.Conv2d(2, 2, 1, dilation=2))
    ('dilation (2, 2)', '')
    """
    if not isinstance(layer, nn.Conv2d):
        return ""
    if any(size > 1 and apart > 1 for size, apart in zip(layer.kernel_size, layer.dilation, strict=True)):
        return f"dilation {layer.dilation}"
    padded = any(layer._reversed_padding_repeated_twice)
    return f"padding_mode {layer.padding_mode!r}" if padded and layer.padding_mode != "zeros" else ""


def _cpu_copy(tensor: Tensor) -> Tensor:
    """On the CPU, and apart from what is trained on."""
    return tensor.detach().to("cpu", copy=True)


def targets_among(paths: Iterable[str], sites: list[str]) -> str | tuple[str, ...]:
    """Last parts of the sites' names where those select exactly them among a model's modules, else the whole names.

    A whole name may be the end of another (``fc`` and ``layers.0.fc``): a regular expression then names each site.
    """
    by_end, chosen = names_by_end(paths), set(sites)
    ends = {site: (site.rpartition(".")[2], site) for site in sites}
    exact = {end for pair in ends.values() for end in pair if by_end[end] <= chosen}
    if not exact.issuperset(sites):
        return one_of_each(sites)
    return tuple(sorted({last if last in exact else site for last, site in ends.values()}))


def one_of_each(sites: Iterable[str]) -> str:
    """The regular expression that these paths match, and no others."""
    return "|".join(re.escape(site) for site in sorted(sites))


def base_probes(model: nn.Module, sites: list[str]) -> dict[str, tuple[float, ...]]:
    """Module path → :func:`probe` of some of the sites, of those whose weight is a parameter.

    One that is computed from others, as by torch.nn.utils.spectral_norm, may be out of date before the first forward.
    """
    own = [path for path in sites if "weight" in model.get_submodule(path)._parameters]
    return {path: probe(model.get_submodule(path)) for path in spread_evenly(own)}


def spread_evenly(sites: list[str]) -> list[str]:
    """At most eight of the sites, evenly spread."""
    count = min(8, len(sites))
    return [sites[i * len(sites) // count] for i in range(count)]


def probe(layer: Any) -> tuple[float, ...]:
    """16 evenly spaced entries of the base weight; of a quantised one, dequantised."""
    flat = (
        kind_of(layer).weight(layer).flatten() if is_quantised(layer) else whole_tensor(layer.weight.detach()).flatten()
    )
    return tuple(float(value) for value in flat[evenly_spaced(PROBED, flat.numel()).to(flat.device)])


def evenly_spaced(count: int, numel: int) -> Int[Tensor, " count"]:
    """Places from the first to the last of ``numel`` numbers. In integers: fp32 counts to 2²⁴ only.

    >>> evenly_spaced(3, 2**25 + 1)
    tensor([       0, 16777216, 33554432])
    """
    return torch.arange(count) * (numel - 1) // (count - 1)
