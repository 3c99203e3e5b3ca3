"""A base model's weights by module path, each read when it is asked for: of a model, of tensors, or of files."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankwise.adapter import SiteAdapter, evenly_spaced, probe
from rankwise.algebra.precision import at_least_fp32
from rankwise.base_probe import PROBED
from rankwise.errors import BaseMismatch, BrokenFile, ShapeMismatch, UnexpectedTensor
from rankwise.files import read_json, tensor_entries
from rankwise.layers.kinds import base_matrix, kind_or_none
from rankwise.methods import nearest
from rankwise.shapes import Float
from rankwise.sites import base_modules
from rankwise.tensor_header import TensorEntry

# A model, its tensors by name, a safetensors file, or a directory of them.
Source = nn.Module | Mapping[str, Tensor] | str | Path

_INDEX = "model.safetensors.index.json"


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of a directory with one or several (shards), by name.

    A tensor is read each time that it is asked for, and nothing is kept.

    Args:
        path: the file or directory.

    Raises:
        BrokenFile, UnsafeFile: there is none, or one cannot be trusted.
        UnexpectedTensor: two files have a tensor of one name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self._entries: dict[str, TensorEntry] = {}
        for file in _shards(self.path):
            for name, entry in tensor_entries(file).items():
                if name in self._files:
                    raise UnexpectedTensor(f"{file}: {name} is in {self._files[name].name} too; expected it once")
                self._files[name], self._entries[name] = file, entry

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, by its file's header."""
        return self._entries[name].shape

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            with safe_open(file, framework="pt", device="cpu") as stream:
                tensor: Tensor = stream.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise BrokenFile(f"{file}: not a whole safetensors file ({error}): fetch it again") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) and Path(f).name == f for f in listed.values()):
            raise BrokenFile(f"{index}: expected names of files in its directory under weight_map; fetch it again")
        return [path / name for name in sorted(set(listed.values()))]
    whole = path / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise BrokenFile(f"{path}: no safetensors file there; expected a model's weights: convert pickles first")
    return files


def tensors_of(source: Source) -> Mapping[str, Tensor]:
    """The source's tensors by name; of a model, its state without what adapters have put there."""
    if isinstance(source, nn.Module):
        modules = base_modules(source)
        owned = ((path, module) for path, module in modules.items())
        return {
            f"{path}.{name}".removeprefix("."): tensor.detach()
            for path, module in owned
            for name, tensor in (module._parameters | module._buffers).items()
            if tensor is not None and name not in module._non_persistent_buffers_set
        }
    return source if isinstance(source, Mapping) else Checkpoint(source)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor, which is not read for it."""
    return tensors.shape(name) if isinstance(tensors, Checkpoint) else tuple(tensors[name].shape)


def transposed_weights(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the weights that are stored [in, out], as GPT-2's are: the bias has a number for each of their columns.

    A square weight with a bias is as the others of its checkpoint are.
    """
    shapes = {
        name: (*shape_of(tensors, name), *shape_of(tensors, f"{name.removesuffix('.weight')}.bias"))
        for name in tensors
        if name.endswith(".weight") and f"{name.removesuffix('.weight')}.bias" in tensors
    }
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    turned = {name for name, (rows, columns, biases) in matrices.items() if rows != columns == biases}
    return turned | {name for name, (rows, columns, _) in matrices.items() if turned and rows == columns}


def name_of_source(source: Source) -> str | None:
    """The name or path of a model, where it is known."""
    if isinstance(source, nn.Module):
        return getattr(getattr(source, "config", None), "_name_or_path", None) or None
    return None if isinstance(source, Mapping) else str(source)


class Names:
    """Names of tensors or modules, found by another checkpoint's.

    A model with a head names its body (``transformer.h.0``), a checkpoint of the body alone may not (``h.0``).
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.known = set(names)
        self.inner = {name.partition(".")[2]: name for name in self.known}

    def like(self, name: str) -> str | None:
        """The name here of what another names so."""
        rest = name.partition(".")[2]
        return name if name in self.known else rest if rest in self.known else self.inner.get(name)


class BaseWeights:
    """The weights that an adapter's sites change.

    Args:
        source: of a model, quantised weights are dequantised. Of tensors and files, a weight's layout is told by its
            shape and its bias's.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return base_modules(self.source) if isinstance(self.source, nn.Module) else {}

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        return tensors_of(self.source)

    @cached_property
    def _names(self) -> Names:
        return Names(self._tensors)

    @cached_property
    def _transposed(self) -> set[str]:
        return transposed_weights(self._tensors)

    def matrix(self, path: str, site: SiteAdapter) -> Float[Tensor, "out in"]:
        """The weight at a site as one matrix, in fp32 or finer.

        Raises:
            BaseMismatch: there is none. ShapeMismatch: it is of another shape than the site's change.
        """
        if isinstance(self.source, nn.Module):
            matrix = base_matrix(self._layer(path))
        else:
            name = self._name(path)
            matrix = _as_matrix(at_least_fp32(self._tensors[name]), site, name in self._transposed)
        if matrix.shape != site.delta.shape:
            raise ShapeMismatch(
                f"{path}: the base's weight is {' × '.join(map(str, matrix.shape))} and the adapter's change "
                f"{site.delta.shape[0]} × {site.delta.shape[1]}; expected the base that the adapter was made for"
            )
        return matrix

    def whole(self, name: str) -> Tensor | None:
        """A tensor by its name, None where there is none of it."""
        known = self._names.like(name)
        return None if known is None else self._tensors[known]

    def probe(self, path: str) -> tuple[float, ...]:
        """What :func:`rankwise.adapter.probe` says of a site's weight."""
        return (
            probe(self._layer(path)) if isinstance(self.source, nn.Module) else probed(self._tensors[self._name(path)])
        )

    def _layer(self, path: str) -> Any:
        if path not in self._modules or kind_or_none(self._modules[path]) is None:
            raise self._absent(path, self._modules)
        return self._modules[path]

    def _name(self, path: str) -> str:
        name = self._names.like(f"{path}.weight")
        if name is None:
            raise self._absent(f"{path}.weight", self._tensors)
        return name

    def _absent(self, name: str, known: Any) -> BaseMismatch:
        return BaseMismatch(
            f"the base has no {name!r}, which the adapter changes{nearest(name, known)}; expected the base that the "
            f"adapter was made for"
        )


def probed(stored: Tensor) -> tuple[float, ...]:
    """16 evenly spaced entries of a weight as it is stored."""
    flat = stored.flatten()
    return tuple(float(value) for value in flat[evenly_spaced(PROBED, flat.numel())])


def _as_matrix(stored: Tensor, site: SiteAdapter, transposed: bool) -> Tensor:
    if site.kind == "conv2d":
        return stored.flatten(1)
    square = stored.shape[0] == stored.shape[-1]
    if site.kind == "linear":  # or a Conv1D, which a file does not tell apart
        return stored.T if (transposed if square else tuple(stored.shape) == site.delta.shape[::-1]) else stored
    return stored.T
