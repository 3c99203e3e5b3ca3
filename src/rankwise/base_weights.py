"""A base model's weights by module path, each read when it is asked for: of a model, of tensors, or of files."""

from collections.abc import Iterator, Mapping
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
        for file in _shards(self.path):
            for name in tensor_entries(file):
                if name in self._files:
                    raise UnexpectedTensor(f"{file}: {name} is in {self._files[name].name} too; expected it once")
                self._files[name] = file

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


class BaseWeights:
    """The weights that an adapter's sites change.

    Args:
        source: of a model, quantised weights are dequantised and a Conv1D's are transposed. Files cannot tell a square
            Conv1D weight from a linear layer's: give the model where there are such layers (GPT-2).
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return base_modules(self.source) if isinstance(self.source, nn.Module) else {}

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        return tensors_of(self.source)

    def matrix(self, path: str, site: SiteAdapter) -> Float[Tensor, "out in"]:
        """The weight at a site as one matrix, in fp32 or finer.

        Raises:
            BaseMismatch: there is none. ShapeMismatch: it is of another shape than the site's change.
        """
        if isinstance(self.source, nn.Module):
            matrix = base_matrix(self._layer(path))
        else:
            matrix = _as_matrix(at_least_fp32(self._stored(path)), site)
        if matrix.shape != site.delta.shape:
            raise ShapeMismatch(
                f"{path}: the base's weight is {' × '.join(map(str, matrix.shape))} and the adapter's change "
                f"{site.delta.shape[0]} × {site.delta.shape[1]}; expected the base that the adapter was made for"
            )
        return matrix

    def whole(self, name: str) -> Tensor | None:
        """A tensor by its name, None where there is none of it."""
        return self._tensors.get(name)

    def probe(self, path: str) -> tuple[float, ...]:
        """What :func:`rankwise.adapter.probe` says of a site's weight."""
        return probe(self._layer(path)) if isinstance(self.source, nn.Module) else probed(self._stored(path))

    def _layer(self, path: str) -> Any:
        if path not in self._modules or kind_or_none(self._modules[path]) is None:
            raise self._absent(path, self._modules)
        return self._modules[path]

    def _stored(self, path: str) -> Tensor:
        """Checkpoints of a bare model lack the name under which a model with a head holds it (``transformer.``)."""
        for name in (f"{path}.weight", f"{path.partition('.')[2]}.weight"):
            if name in self._tensors:
                return self._tensors[name]
        raise self._absent(f"{path}.weight", self._tensors)

    def _absent(self, name: str, known: Any) -> BaseMismatch:
        return BaseMismatch(
            f"the base has no {name!r}, which the adapter changes{nearest(name, known)}; expected the base that the "
            f"adapter was made for"
        )


def probed(stored: Tensor) -> tuple[float, ...]:
    """16 evenly spaced entries of a weight as it is stored."""
    flat = stored.flatten()
    return tuple(float(value) for value in flat[evenly_spaced(PROBED, flat.numel())])


def _as_matrix(stored: Tensor, site: SiteAdapter) -> Tensor:
    if site.kind == "conv2d":
        return stored.flatten(1)
    transposed = site.kind in ("embedding", "conv1d") or tuple(stored.shape) == site.delta.shape[::-1]
    square = stored.shape[0] == stored.shape[-1]
    return stored.T if transposed and not (square and site.kind == "linear") else stored
