"""Which tensors of a file make a site, by their names and shapes: of tensors, arrays and a header's entries alike.

Nothing here needs torch.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from rankwise.errors import MissingTensor, ShapeMismatch, UnexpectedTensor, UnsupportedAdapter
from rankwise.format.configuration import pair_variants
from rankwise.format.names import BASE_COPY, CONFIG, EMBEDDING_PAIR, PAIR, site_and_suffix


@runtime_checkable
class Shaped(Protocol):
    """A tensor, an array, or what a header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


S = TypeVar("S", bound=Shaped)


def by_site(where: Path, tensors: Mapping[str, S]) -> dict[str, dict[str, S]]:
    """Module path → file suffix → tensor.

    Raises:
        UnexpectedTensor: one is no site's. MissingTensor: there are none.
    """
    sites: dict[str, dict[str, S]] = {}
    for key, tensor in tensors.items():
        path_and_suffix = site_and_suffix(key)
        if path_and_suffix is None:
            raise stray(where, key, tensor)
        path, suffix = path_and_suffix
        sites.setdefault(path, {})[suffix] = tensor
    if not sites:
        raise MissingTensor(f"{where}: holds no tensors; expected lora_A and lora_B of at least one module")
    return sites


def stray(where: Path, key: str, tensor: Shaped) -> UnexpectedTensor:
    """The error for a tensor that is no site's."""
    return UnexpectedTensor(f"{where}: {key} {tuple(tensor.shape)} belongs to no adapter site; it is not read")


def pair_names(where: Path, path: str, suffixes: Iterable[str]) -> tuple[str, str]:
    """The suffixes of a site's A and B.

    Raises:
        MissingTensor: one of them is not there.
    """
    present = set(suffixes)
    A, B = EMBEDDING_PAIR if present.intersection(EMBEDDING_PAIR) else PAIR
    for name, other in ((A, B), (B, A)):
        if name not in present:
            raise MissingTensor(f"{where}: {path} has {other} but no {name}; expected both halves of the pair")
    return A, B


def check_beside(where: Path, path: str, suffixes: Iterable[str], variant: str) -> None:
    """What stands beside a pair must be the variant's; loading the rest would be another function.

    Raises:
        UnexpectedTensor: it is not.
    """
    for suffix in suffixes:
        if suffix == BASE_COPY or suffix in pair_variants()[variant].tensors:
            continue
        marks = [other.marks for other in pair_variants().values() if suffix in other.tensors]
        hint = f"; {CONFIG} does not say {', '.join(marks[0])}" if marks else ""
        raise UnexpectedTensor(f"{where}: {path} has {suffix}, which the configured adapter does not have{hint}")


def check_pair(
    where: Path, path: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtypes: tuple[str, str], rank: int
) -> None:
    """Refuse an A and a B that do not go together.

    Args:
        shapes, dtypes: of A and of B.

    Raises:
        ShapeMismatch: as it says.
    """
    A, B = shapes
    fits = len(A) == len(B) and len(A) in (2, 4) and A[0] == rank
    fits = fits and (B[1] == rank or (len(A) == 4 and B[1] > 0 and rank % B[1] == 0))
    fits = fits and all(size == 1 for size in B[2:])
    if not fits or not all(map(is_floating, dtypes)):
        raise ShapeMismatch(
            f"{where}: {path}: lora_A {A} {dtypes[0]} and lora_B {B} {dtypes[1]} do not make a pair of rank {rank}, "
            f"which {CONFIG} gives; expected ({rank}, in) and (out, {rank})"
        )


def is_floating(dtype: str) -> bool:
    """Whether a type's name, torch's or safetensors', is that of floating-point numbers."""
    return dtype.removeprefix("torch.").lower().startswith(("f", "bf"))


def shared_A(where: Path, path: str, A: Any, groups: int) -> Any:
    """(groups·r, in, kh, kw) as (r, in/groups, kh, kw): PEFT's lora_A sees all channels, so A stands once per group.

    Args:
        A: a tensor or an array.

    Raises:
        ShapeMismatch: the channels do not divide into groups.
        UnsupportedAdapter: A mixes channels across groups, so ΔW is no grouped convolution.
    """
    if groups == 1:
        return A
    if A.shape[1] % groups:
        raise ShapeMismatch(
            f"{where}: {path}: lora_A {tuple(A.shape)} has {A.shape[1]} channels, which do not divide into the "
            f"{groups} groups that lora_B's columns tell of"
        )
    blocks = A.reshape(groups, -1, groups, A.shape[1] // groups, *A.shape[2:])
    shared = blocks[0, :, 0]
    places = product(range(groups), repeat=2)
    if not all(bool((blocks[i, :, j] == (shared if i == j else 0)).all()) for i, j in places):
        raise UnsupportedAdapter(
            f"{where}: {path}: its lora_A mixes channels across the {groups} groups of the convolution, so it cannot "
            f"be folded into the weight; expected one A shared by all groups"
        )
    return shared
