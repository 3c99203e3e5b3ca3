"""The full-precision weights behind a quantised base: evidence for inits that correct what quantisation lost."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankwise.algebra.precision import at_least_fp32
from rankwise.errors import EvidenceError
from rankwise.layers.kinds import kind_of
from rankwise.planning import target_layers
from rankwise.shapes import Float


def weights(model: nn.Module, target_modules: str | Iterable[str] = "all-linear") -> dict[str, Float[Tensor, "out in"]]:
    """Module path → weight as one matrix [out, in] (a view): ``attach(quantised, spec, evidence=weights(original))``.

    Args:
        model: the full-precision model with the same module paths as the quantised one.
    """
    layers: dict[str, Any] = dict(target_layers(model, target_modules))
    return {name: kind_of(layer).matrix(layer, layer.weight.detach()) for name, layer in layers.items()}


def stored_weights(reference: str | Path, layers: dict[str, nn.Module]) -> dict[str, Float[Tensor, "out in"]]:
    """The same from a safetensors file, or a directory with ``model.safetensors`` or its index, for these layers.

    Raises:
        EvidenceError: no such file, or no tensor ``<module path>.weight`` in it.
    """
    files = _files(Path(reference), [f"{name}.weight" for name in layers])
    return {
        name: kind_of(layer).matrix(layer, _read(files[f"{name}.weight"], f"{name}.weight"))
        for name, layer in layers.items()
    }


def _files(reference: Path, keys: list[str]) -> dict[str, Path]:
    """Tensor name → the file that should hold it."""
    index = reference / "model.safetensors.index.json"
    if not index.is_file():
        return dict.fromkeys(keys, reference / "model.safetensors" if reference.is_dir() else reference)
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = [key for key in keys if key not in listed]
    if missing:
        raise EvidenceError(f"{index}: lists no {missing[0]} ({len(missing)} missing in all); is it another model's?")
    return {key: reference / listed[key] for key in keys}


def _read(file: Path, key: str) -> Tensor:
    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            tensor: Tensor = stream.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise EvidenceError(
            f"{file}: cannot read {key} ({error}); expected the full-precision base's own safetensors, "
            f"with the same module paths as the quantised model"
        ) from None
    return at_least_fp32(tensor)
