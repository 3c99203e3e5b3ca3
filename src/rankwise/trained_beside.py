"""What a spec trains beside its pairs: biases, and the embeddings of single tokens."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn

from rankwise.errors import SpecError, TargetError
from rankwise.layers.kinds import EmbeddingKind, LinearKind, kind_or_none
from rankwise.layers.quantised import is_quantised
from rankwise.patterns import keys_under, names_by_end
from rankwise.sites import base_modules
from rankwise.variants.base import PairVariant


@runtime_checkable
class _HasInputEmbeddings(Protocol):
    def get_input_embeddings(self) -> Any: ...


@dataclass(frozen=True)
class TrainedBeside:
    """What is trained beside the pairs; prints as lines of a plan.

    Attributes:
        biases: names of parameters.
        tokens: path of an embedding (or an output head) → the ids whose rows are trained.
        tied: path of a layer that shares its weight with one of those → that one's path.
    """

    biases: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """One for the biases, one for each embedding."""
        if self.biases:
            yield f"{len(self.biases)} biases, {self.biases[0]} the first"
        for path, ids in self.tokens.items():
            tied = [other for other, source in self.tied.items() if source == path]
            follow = f", and of {', '.join(tied)}, tied to it" if tied else ""
            yield f"{len(ids)} rows of {path}{follow}"


def trained_beside(model: nn.Module, spec: Any, sites: Collection[str]) -> TrainedBeside:
    """What ``spec`` trains on ``model`` beside the pairs at the sites.

    Raises:
        TargetError: no bias is there to be trained; a token's embedding is not there, or cannot be trained by rows.
        SpecError: rows of a layer that is adapted or trained whole.
    """
    if spec.trainable_token_indices is not None and not isinstance(spec.variant, PairVariant):
        raise SpecError("trainable_token_indices goes with a variant that changes weights; leave it out")
    tokens, tied = trained_tokens(model, spec.trainable_token_indices)
    taken = {*sites, *keys_under(spec.modules_to_save, base_modules(model))}.intersection([*tokens, *tied])
    if taken:
        raise SpecError(
            f"{min(taken)}: trainable_token_indices trains rows of its weight, which is adapted or trained whole as "
            f"well; expected one of them: name it in exclude_modules, or leave the tokens to it"
        )
    biases = trained_biases(model, spec.bias, sites)
    if spec.bias != "none" and not biases:
        raise TargetError(f"bias={spec.bias!r}: expected a layer with a bias among those meant, found none")
    return TrainedBeside(tuple(biases), tokens, tied)


def trained_biases(model: nn.Module, bias: str, sites: Collection[str]) -> list[str]:
    """Names of the biases that PEFT's word for them means, in the model's order."""
    if bias == "none":
        return []
    modules, adapted = base_modules(model), set(sites)
    meant = {path: module for path, module in modules.items() if bias == "all" or path in adapted}
    return [f"{path}.bias".removeprefix(".") for path, m in meant.items() if m._parameters.get("bias") is not None]


Tokens = tuple[dict[str, tuple[int, ...]], dict[str, str]]


def trained_tokens(model: nn.Module, indices: Any) -> Tokens:
    """Path → ids, and path of each layer that shares one's weight → that one's path.

    Raises:
        TargetError: see :func:`trained_beside`.
    """
    if indices is None:
        return {}, {}
    modules: dict[str, Any] = base_modules(model)
    by_end = names_by_end(modules)
    named = indices if isinstance(indices, Mapping) else {_input_embeddings(modules): indices}
    tokens: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    for name, ids in named.items():
        if name not in by_end:
            raise TargetError(f"trainable_token_indices: {name!r} is no module of this model; expected an embedding's")
        for path in sorted(by_end[name]):
            _check_rows(path, modules[path], ids)
            source = next((other for other in tokens if modules[other].weight is modules[path].weight), None)
            if source is None or tokens[source] != ids:
                tokens[path] = ids
            else:
                tied[path] = source
    for path, module in modules.items():
        if path not in tokens and isinstance(kind_or_none(module), LinearKind | EmbeddingKind):
            tied.update((path, source) for source in tokens if modules[source].weight is module.weight)
    return tokens, tied


def _input_embeddings(modules: Mapping[str, nn.Module]) -> str:
    """Path of what a model of transformers calls its input embeddings; else PEFT's guess."""
    root = modules[""]
    layer = root.get_input_embeddings() if isinstance(root, _HasInputEmbeddings) else None
    return next((path for path, module in modules.items() if module is layer), "embed_tokens")


def _check_rows(path: str, layer: Any, ids: Collection[int]) -> None:
    kind = kind_or_none(layer)
    if not isinstance(kind, LinearKind | EmbeddingKind) or is_quantised(layer):
        raise TargetError(
            f"trainable_token_indices: {path} is a {type(layer).__name__}; expected an Embedding, or a Linear as an "
            f"output head, whose weight is not quantised"
        )
    if max(ids) >= len(layer.weight):
        raise TargetError(
            f"trainable_token_indices: {path} has {len(layer.weight)} rows, found the id {max(ids)}; add the tokens "
            f"first: model.resize_token_embeddings({max(ids) + 1})"
        )
