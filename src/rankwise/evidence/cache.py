"""Gradients on disk, good only for the very weights, batches and settings that they were collected with."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rankwise.collection import Collection
from rankwise.errors import BrokenFile, EvidenceError
from rankwise.evidence.backward import Loss
from rankwise.evidence.exact import ExactGradient
from rankwise.evidence.processes import everyones, process_number
from rankwise.evidence.sketch import SketchedGradient
from rankwise.evidence.undisturbed import each_batch, undisturbed
from rankwise.tensor_files import read_metadata, read_tensors, write_tensors

Gradients = Mapping[str, ExactGradient] | Mapping[str, SketchedGradient]
Fingerprint = dict[str, str]
_KEY = "rankwise_gradients"
_WHAT = {
    "weights": "other base weights",
    "data": "other batches",
    "settings": "other settings",
    "loss": "another loss function",
}


def cached(path: Path, settings: Fingerprint, collect: Callable[[], Gradients]) -> Gradients:
    """What the file holds if it was collected under this fingerprint; a new file if there is none.

    Raises:
        EvidenceError: the file was collected under another fingerprint; it is left as it is.
        BrokenFile, NonFiniteTensor: it cannot be trusted.
    """
    if path.exists():
        _check(path, settings)
        return _unpacked(read_tensors(path))
    evidence = collect()
    if process_number() == 0:
        write_tensors(path, _packed(evidence), {_KEY: json.dumps(settings)})
    return evidence


def fingerprint(model: nn.Module, collection: Collection, batches: Iterable[Any], loss: Loss | None) -> Fingerprint:
    """Hashes of all tensors of the model and of all processes' batches; what is collected, as text.

    Another loss function is recognised by its value on the first batch, whatever its name.
    """
    weights, data = hashlib.sha256(), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            weights.update(name.encode())
            _hash_tensor(weights, tensor)
    for batch in batches:
        _hash_value(data, batch)
    sites = {site.name: part.directions.get(site.name) for part in collection.passes for site in part.sites}
    sweeps = max(part.sweeps for part in collection.passes)
    return {
        "weights": _joined(weights.hexdigest()),
        "data": _joined(data.hexdigest()),
        "settings": json.dumps({"kind": collection.kind, "sweeps": sweeps, "directions": sites}),
        "loss": "" if loss is None else _first_value(model, batches, loss),
    }


def _first_value(model: nn.Module, batches: Iterable[Any], loss: Loss) -> str:
    with undisturbed(model), torch.no_grad():
        return f"{float(loss(model, next(iter(each_batch(batches))))):.3e}"


def _joined(digest: str) -> str:
    return hashlib.sha256("".join(str(share) for share in everyones(digest)).encode()).hexdigest()


def _hash_value(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _hash_tensor(digest, value)
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(repr(key).encode())
            _hash_value(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} items".encode())
        for item in value:
            _hash_value(digest, item)
    elif value is None or isinstance(value, str | int | float | bool):
        digest.update(repr(value).encode())
    else:
        raise EvidenceError(
            f"a batch holds a {type(value).__name__}, which has no defined content to compare a cache by; expected "
            f"tensors, numbers and text in dicts, lists and tuples: bring it into that form, or leave cache out"
        )


def _hash_tensor(digest: Any, tensor: Tensor) -> None:
    local = _local(tensor.detach())
    digest.update(f"{local.dtype} {tuple(local.shape)}".encode())
    digest.update(local.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread over several."""
    if not torch.distributed.is_available():
        return tensor
    from torch.distributed.tensor import DTensor  # takes a while, so only here

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check(path: Path, expected: Fingerprint) -> None:
    try:
        settings = json.loads(read_metadata(path).get(_KEY, ""))
    except (SafetensorError, OSError, ValueError) as error:  # whatever a file of another kind leads the reader to
        raise BrokenFile(f"{path}: not a file of cached gradients ({error}); name another cache") from None
    for key, what in _WHAT.items():
        if settings.get(key) != expected[key]:
            raise EvidenceError(
                f"{path}: the gradients in it were collected with {what}: expected {expected[key]}, found "
                f"{settings.get(key)}; delete the file to collect anew, or name another cache"
            )


def _packed(evidence: Gradients) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, gradient in evidence.items()
        for part, value in vars(gradient).items()
    }


def _unpacked(tensors: Mapping[str, Tensor]) -> Gradients:
    by_name: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        by_name.setdefault(name, {})[part] = tensor if tensor.dim() else float(tensor)
    if all("matrix" in parts for parts in by_name.values()):
        return {name: ExactGradient(**parts) for name, parts in by_name.items()}
    return {name: SketchedGradient(**parts) for name, parts in by_name.items()}
