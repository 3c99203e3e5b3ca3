"""What "all-linear" leaves out: heads, to be trained whole, and large weights that belong to no layer it knows."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.layers.kinds import Conv2dKind, EmbeddingKind, kind_of, kind_or_none
from rankwise.layers.quantised import is_quantised
from rankwise.patterns import keys_under
from rankwise.sites import base_modules

SMALL = 4  # rows or columns of what is rather a gate than a layer
LARGE = 0.01  # share of a model's weights from which on they are worth a line


@runtime_checkable
class _HasHead(Protocol):
    """transformers' models say which module is their output head, and which their body."""

    base_model: Any

    def get_output_embeddings(self) -> Any: ...


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" may take it."""
    kind = kind_or_none(module)
    return kind is not None and kind.name in ("linear", "conv1d")


def linear_layers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of what "all-linear" takes: every linear layer but heads; of a convnet, which has none, convolutions."""
    others = {*output_heads(modules), *_not_wanted(modules)}
    linear = [path for path, module in modules.items() if is_linear(module) and path not in others]
    return linear or [path for path, module in modules.items() if isinstance(kind_or_none(module), Conv2dKind)]


def _not_wanted(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of a linear layer for which no adapter is meant → why."""
    attention = [path for path, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    past = [f"{path}.out_proj".removeprefix(".") for path in attention]
    why = dict.fromkeys(past, "whose weight nn.MultiheadAttention uses without calling it")
    others = {path: module for path, module in modules.items() if is_linear(module) and not is_followed(module)}
    return why | {path: f"a {type(m).__name__}, whose forward is more than x Wᵀ + b" for path, m in others.items()}


def is_followed(layer: Any) -> bool:
    """Whether an adapter can go on a layer: its kind is known, and its forward is what layers of that kind compute.

    One of a linear layer's subclass is tried on a vector: routers return tuples, grouped layers take other shapes.
    """
    forward: Any = type(layer).forward
    if not isinstance(layer, nn.Linear) or forward is nn.Linear.forward or is_quantised(layer):
        return kind_or_none(layer) is not None
    weight = layer.weight
    x = torch.linspace(-1.0, 1.0, layer.in_features, device=weight.device).to(weight.dtype)[None]
    with torch.no_grad():
        expected = F.linear(x, weight, layer.bias)
        try:
            y = forward(layer, x)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # it wants something else
            return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    return y.is_meta or torch.allclose(
        y.to(expected.dtype), expected, rtol=0.02, atol=0.02 * float(expected.abs().max())
    )


def output_heads(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the linear layers that "all-linear" never takes: the output head of a language model, and new heads."""
    return _vocabulary_heads(modules) | _new_heads(modules)


def _vocabulary_heads(modules: Mapping[str, nn.Module]) -> set[str]:
    """What transformers calls the output embeddings, and any linear layer that shares an embedding's weight."""
    heads = {id(m.get_output_embeddings()) for m in modules.values() if isinstance(m, _HasHead)}
    tables = {id(m.weight) for m in modules.values() if isinstance(kind_or_none(m), EmbeddingKind)}
    return {path for path, m in modules.items() if is_linear(m) and (id(m) in heads or id(m.weight) in tables)}


def _new_heads(modules: Mapping[str, nn.Module]) -> set[str]:
    """What a model of transformers without output embeddings has beside its body: a classifier's layers."""
    model = modules[""]
    if not isinstance(model, _HasHead) or model.base_model is model or model.get_output_embeddings() is not None:
        return set()
    body = set(model.base_model.modules())
    return {path for path, module in modules.items() if is_linear(module) and module not in body}


def last_layers(layers: Mapping[str, nn.Module]) -> set[str]:
    """Of the layers in the model's order the last ones, as long as they take inputs of the same width: heads, perhaps.

    >>> heads = nn.ModuleDict({"topic": nn.Linear(8, 5), "mood": nn.Linear(8, 2)})
    >>> sorted(last_layers({"body": nn.Linear(9, 8), "heads.topic": heads["topic"], "heads.mood": heads["mood"]}))
    ['heads.mood', 'heads.topic']
    """
    last: set[str] = set()
    widths = {path: kind.shape(layer)[1] for path, layer in layers.items() if (kind := kind_or_none(layer))}
    for path, width in reversed(widths.items()):
        if width != next(reversed(widths.values())):
            break
        last.add(path)
    return last


def may_be_small(layers: Mapping[str, nn.Module]) -> set[str]:
    """Of what "all-linear" takes, the layers that may be too small for a rank: perhaps heads, gates, convolutions."""
    kinds = {path: kind_of(layer) for path, layer in layers.items()}
    gates = {path for path, kind in kinds.items() if min(kind.shape(layers[path])) <= SMALL}
    return last_layers(layers) | gates | {path for path, kind in kinds.items() if isinstance(kind, Conv2dKind)}


def notes_on_left_out(model: nn.Module, sites: Iterable[str], whole: Iterable[str], excluded: set[str]) -> list[str]:
    """A line for each new head that neither is adapted nor trained whole, and for large weights that no layer owns."""
    modules, sites = base_modules(model), set(sites)
    not_wanted, served = _not_wanted(modules), {*sites, *excluded, *keys_under(whole, modules)}
    others = {*_vocabulary_heads(modules), *not_wanted}
    linear: dict[str, Any] = {path: m for path, m in modules.items() if is_linear(m) and path not in others}
    heads = (_new_heads(modules) | last_layers(linear)) - served
    notes = [
        f"{path} ({' × '.join(map(str, layer.weight.shape))}), a head; to train it whole: modules_to_save=[{path!r}]"
        for path, layer in linear.items()
        if path in heads
    ]
    notes += [f"{path}, {why}" for path, why in not_wanted.items() if path not in served]
    small = [path for path in linear_layers(modules) if path not in served and path not in heads]
    return notes + [f"{path}, too small for the rank" for path in small] + _large_weights(model, modules)


def _large_weights(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    total = sum(parameter.numel() for parameter in model.parameters())
    groups: defaultdict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for path, module in modules.items():
        if kind_or_none(module) is None and "parametrizations" not in path:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() > 1 and len(parameter) > 1:
                    groups[re.sub(r"\.\d+(?=\.)", ".*", f"{path}.{name}"), tuple(parameter.shape)] += 1
    return [
        f"{count} × {name} ({' × '.join(map(str, shape))}), {share:.0%} of the weights: "
        f"{'experts fused into one tensor' if len(shape) == 3 else 'a tensor of its own'}, not a linear layer"
        for (name, shape), count in groups.items()
        if (share := count * prod(shape) / total) >= LARGE
    ]
