"""Which tensors of a file make a site, by their names and shapes: of tensors, arrays and a header's entries alike.

Nothing here needs torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from rankwise.errors import MissingTensor, ShapeMismatch, SpecError, TargetError, UnexpectedTensor, UnsupportedAdapter
from rankwise.format.adalora import as_plain_pair
from rankwise.format.configuration import is_adalora, pair_variants
from rankwise.format.names import (
    CONFIG,
    EMBEDDING_PAIR,
    PAIR,
    PREFIX,
    TENSORS,
    is_base_copy,
    is_embedding,
    is_token_rows,
    site_and_suffix,
    whole_name,
)
from rankwise.patterns import keys_under, pattern_values
from rankwise.scaling import declared

T = TypeVar("T")


def named_whole(fields: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The fields, with the modules that PEFT takes a name in modules_to_save for, by their paths.

    To PEFT it is the end of a path, in the middle of a part too: "classifier" also names ``pre_classifier``.
    """
    names = fields["modules_to_save"]
    paths = {name.rpartition(".")[0] for key in keys if key.startswith(PREFIX) and (name := whole_name(key))}
    meant = {place for path in paths for place in _beginnings(path) if names and place.endswith(tuple(names))}
    return {**fields, "modules_to_save": (*names, *sorted(meant.difference(keys_under(names, meant))))}


def _beginnings(path: str) -> list[str]:
    """``a.b.c`` → a, a.b, a.b.c."""
    parts = path.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def whole_keys(keys: Iterable[str], config: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Those of a file's names that stand for modules' own tensors.

    Trained whole, embeddings' and rows of them, adapted layers' own, biases that are trained.
    """
    names = [key for key in keys if key.startswith(PREFIX)]
    trained = set(keys_under(fields["modules_to_save"], names))
    whole = [
        key
        for key in names
        if key in trained
        or is_embedding(key)
        or is_base_copy(key)
        or is_token_rows(key)
        or (fields["bias"] != "none" and key.endswith(".bias"))
    ]
    return [key for key in whole if site_and_suffix(key, bare_pairs=is_adalora(config)) is None]


def whole_tensors(source: Path, tensors: Mapping[str, T]) -> dict[str, T]:
    """Name in the model → tensor, of what :func:`whole_keys` names; PEFT's copies of what they replaced are left out.

    Raises:
        UnexpectedTensor: two are meant for one name.
    """
    named: dict[str, T] = {}
    for key, tensor in tensors.items():
        name = whole_name(key)
        if name in named:
            raise UnexpectedTensor(f"{source}: {key} is a second {name}; expected one")
        if name is not None:
            named[name] = tensor
    return named


def by_site(source: Path, tensors: Mapping[str, T], config: Mapping[str, Any]) -> dict[str, dict[str, T]]:
    """Module path → file suffix → tensor.

    Args:
        source: the file, for the error.
        config: of the adapter, whose kind decides how names are spelt.

    Raises:
        UnexpectedTensor: one is no site's, or a second one for its place. MissingTensor: there are none.
    """
    sites: dict[str, dict[str, T]] = {}
    for key, tensor in tensors.items():
        path_and_suffix = site_and_suffix(key, bare_pairs=is_adalora(config))
        if path_and_suffix is None:
            raise stray(source, key, tensor)
        path, suffix = path_and_suffix
        if suffix in sites.setdefault(path, {}):
            raise UnexpectedTensor(f"{source}: {key} is a second {suffix} of {path}; expected one")
        sites[path][suffix] = tensor
    if not sites:
        raise MissingTensor(f"{source}: holds no tensors; expected lora_A and lora_B of at least one module")
    return sites


def stray(source: Path, key: str, tensor: Any) -> UnexpectedTensor:
    """The error for a tensor, an array, or what a header says of one, that is no site's."""
    expected = f"names such as {PREFIX}<module>.lora_A.weight"
    return UnexpectedTensor(
        f"{source}: {key} {tuple(tensor.shape)} belongs to no adapter site, and PEFT would leave it aside; expected "
        f"{expected}: rename it, or take it out"
    )


@dataclass(frozen=True, eq=False)
class StoredSite:
    """One site's part of a file, as tensors or as arrays.

    Attributes:
        kind: "linear" (a file cannot tell it from "conv1d"), "conv2d" or "embedding".
        A, B: [r, in] and [out, r].
        scale: of ΔW = scale · B A.
        kernel: the axes that ``in`` unfolds to, (in/groups, kh, kw) for a convolution, else ().
        groups: of a grouped convolution.
        extra: what stands beside the pair, by file suffix.
    """

    kind: str
    A: Any
    B: Any
    scale: float
    kernel: tuple[int, ...]
    groups: int
    extra: dict[str, Any]


class SiteReader:
    """What a configuration says of each site of a file, and what it makes of the site's tensors.

    Args:
        fields: what the configuration states, see :func:`rankwise.format.configuration.stated_fields`.
        paths: of the modules that the file has tensors for.

    Raises:
        SpecError: a pattern takes too long.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], fields: Mapping[str, Any], paths: list[str]) -> None:
        self.source, self.config, self.fields = folder / TENSORS, config, fields
        try:
            self.ranks = pattern_values("rank_pattern key", fields["rank_pattern"], paths, fields["rank"])
            self.alphas = pattern_values("alpha_pattern key", fields["alpha_pattern"], paths, fields["alpha"])
        except TargetError as error:
            raise SpecError(f"{folder / CONFIG}: {error}") from None

    def site(self, path: str, tensors: Mapping[str, Any]) -> StoredSite:
        """The site at a module path.

        Args:
            tensors: file suffix → tensor or array.

        Raises:
            MissingTensor, UnexpectedTensor, ShapeMismatch, UnsupportedAdapter: they do not make one.
            SpecError: AdaLoRA's alpha is out of range.
        """
        rank, alpha = self.ranks[path], self.alphas[path]
        if is_adalora(self.config):
            tensors = as_plain_pair(self.source, path, self.config, tensors)
            rank = alpha = tensors["lora_A"].shape[0]
        pair = EMBEDDING_PAIR if not tensors.keys().isdisjoint(EMBEDDING_PAIR) else PAIR
        for name, other in (pair, pair[::-1]):
            if name not in tensors:
                raise MissingTensor(
                    f"{self.source}: {path} has {other} but no {name}; expected both halves of the pair"
                )
        A, B = (tensors[name] for name in pair)
        extra = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in pair}
        self._check_extra(path, extra)
        self._check_pair(path, A, B, rank)
        groups = rank // B.shape[1]  # a grouped convolution's B has rank/groups columns
        kind = "embedding" if pair == EMBEDDING_PAIR else "conv2d" if len(A.shape) == 4 else "linear"
        A = self._shared_A(path, A, groups)
        kernel = tuple(A.shape[1:]) if kind == "conv2d" else ()
        scale = declared(self.fields["scaling"] == "rslora")(alpha, rank)
        return StoredSite(kind, A.reshape(len(A), -1), B.reshape(-1, B.shape[1]), scale, kernel, groups, extra)

    def _check_extra(self, path: str, extra: Mapping[str, Any]) -> None:
        """What stands beside a pair must be the variant's; loading the rest would be another function."""
        for suffix in sorted(extra):
            variants = pair_variants()
            if suffix not in variants[self.fields["variant"]].tensors:
                marks = [other.marks for other in variants.values() if suffix in other.tensors]
                hint = f"; {CONFIG} does not say {', '.join(marks[0])}" if marks else ""
                raise UnexpectedTensor(
                    f"{self.source}: {path} has {suffix}, which the configured adapter does not have{hint}"
                )

    def _check_pair(self, path: str, A: Any, B: Any, rank: int) -> None:
        """Refuse an A and a B that do not go together."""
        shape_A, shape_B, dtypes = tuple(A.shape), tuple(B.shape), (str(A.dtype), str(B.dtype))
        fits = len(shape_A) == len(shape_B) and len(shape_A) in (2, 4) and shape_A[0] == rank
        fits = fits and (shape_B[1] == rank or (len(shape_A) == 4 and shape_B[1] > 0 and rank % shape_B[1] == 0))
        fits = fits and all(size == 1 for size in shape_B[2:])
        if not fits or not all("float" in dtype for dtype in dtypes):
            raise ShapeMismatch(
                f"{self.source}: {path}: lora_A {shape_A} {dtypes[0]} and lora_B {shape_B} {dtypes[1]} do not make a "
                f"pair of rank {rank}, which {CONFIG} gives; expected ({rank}, in) and (out, {rank})"
            )

    def _shared_A(self, path: str, A: Any, groups: int) -> Any:
        """(groups·r, in, kh, kw) as (r, in/groups, kh, kw): PEFT's lora_A sees all channels, so A is there per group.

        Raises:
            ShapeMismatch: the channels do not divide into groups.
            UnsupportedAdapter: A mixes channels across groups, so ΔW is no grouped convolution.
        """
        if groups == 1:
            return A
        if A.shape[1] % groups:
            raise ShapeMismatch(
                f"{self.source}: {path}: lora_A {tuple(A.shape)} has {A.shape[1]} channels, which do not divide into "
                f"the {groups} groups that lora_B's columns tell of"
            )
        blocks = A.reshape(groups, -1, groups, A.shape[1] // groups, *A.shape[2:])
        shared = blocks[0, :, 0]
        places = product(range(groups), repeat=2)
        if not all(bool((blocks[i, :, j] == (shared if i == j else 0)).all()) for i, j in places):
            raise UnsupportedAdapter(
                f"{self.source}: {path}: its lora_A mixes channels across the {groups} groups of the convolution, so "
                f"it cannot be folded into the weight; expected one A shared by all groups"
            )
        return shared
