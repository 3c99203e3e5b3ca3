"""The adapters that are served: which there are, and which of them are in memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from transformers import PreTrainedModel

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.algebra.precision import fp32_or_finer
from rankwise.errors import AdapterTooLarge, CheckpointError, Overloaded, RequestError, UnknownModel
from rankwise.files import tensor_entries
from rankwise.format.names import CONFIG, TENSORS
from rankwise.inspection.inspection import inspect
from rankwise.methods import nearest
from rankwise.train.model.generation import refuse_classifier

_NAME_LIMIT = 200


@dataclass(eq=False)
class ServedAdapter:
    """An adapter that requests may name.

    Attributes:
        created: when it came, in seconds since 1970.
        slot: its name on the model while it is in memory, else None.
        size: bytes that it takes there.
        users: rows of the running batch that have it. While there are any it stays in memory.
        retired: taken off the list; it goes when its last user does.
    """

    name: str
    directory: Path
    created: int = field(default_factory=lambda: int(time.time()))
    slot: str | None = None
    size: int = 0
    users: int = 0
    retired: bool = False


class AdapterStore:
    """Adapters by name, the ones used last in memory. Only one thread may change it: the one that runs the model.

    Args:
        base: the base model's name, which no adapter may have.
        max_count, max_bytes: of the adapters in memory. Beyond them, the one that was used longest ago leaves.
    """

    def __init__(self, model: PreTrainedModel, base: str, *, max_count: int, max_bytes: int) -> None:
        self.model, self.base = model, base
        self.max_count, self.max_bytes = max_count, max_bytes
        self.adapters: dict[str, ServedAdapter] = {}
        self._loaded: dict[ServedAdapter, None] = {}  # in the order of their last use
        self._numbers = count()

    @property
    def loaded(self) -> list[ServedAdapter]:
        """Those in memory."""
        return list(self._loaded)

    def find(self, name: str) -> ServedAdapter | None:
        """The adapter of this name; None for the base model's.

        Raises:
            UnknownModel: there is none.
        """
        if name == self.base:
            return None
        adapter = self.adapters.get(name)
        if adapter is None:
            names = [self.base, *self.adapters]
            raise UnknownModel(
                f"model: nothing is served as {name!r}{nearest(name, names)}; GET /v1/models lists what is"
            )
        return adapter

    def add(self, name: str, directory: Path) -> None:
        """Serve the adapter in a directory, of which :func:`check_directory` has nothing to say, once it has loaded.

        Raises:
            RequestError: the name is taken or malformed. Overloaded: there is no room, as all in memory are in use.
            What ``rankwise.load`` raises: it is another base's, say. The model is then as it was.
        """
        self._check_name(name)
        adapter = ServedAdapter(name, directory)
        if not self._load(adapter):
            raise Overloaded(
                f"{directory}: no room, as all {len(self._loaded)} adapters in memory are in use: ask again later, or "
                f"start the server with more --max-adapters or --adapter-memory"
            )
        self.adapters[name] = adapter

    def retire(self, name: str) -> None:
        """Serve the adapter no longer. What has been asked of it is answered still.

        Raises:
            UnknownModel: there is none of this name. RequestError: it is the base model's.
        """
        adapter = self.find(name)
        if adapter is None:
            raise RequestError(f"lora_name: expected an adapter's name, found the base model's, {name!r}")
        del self.adapters[name]
        adapter.retired = True
        self._drop_if_retired(adapter)

    def acquire(self, adapter: ServedAdapter) -> bool:
        """Bring an adapter into memory, to stay until it is released; False while all others there are in use.

        Raises:
            What ``rankwise.load`` raises, if its files have changed.
        """
        if adapter.slot is None and not self._load(adapter):
            return False
        self._loaded[adapter] = self._loaded.pop(adapter)
        adapter.users += 1
        return True

    def release(self, adapter: ServedAdapter) -> None:
        """Undo one :meth:`acquire`."""
        adapter.users -= 1
        self._drop_if_retired(adapter)

    def _check_name(self, name: str) -> None:
        if not name or len(name) > _NAME_LIMIT or not name.isprintable():
            raise RequestError(f"lora_name: expected 1 to {_NAME_LIMIT} printable letters, found {name[:40]!r}")
        if name == self.base or name in self.adapters:
            raise RequestError(f"lora_name: {name!r} is served already: unload it first, or choose another name")

    def _load(self, adapter: ServedAdapter) -> bool:
        if not self._make_room(adapter.directory):
            return False
        slot = f"served-{next(self._numbers)}"
        rw.load(self.model, adapter.directory, name=slot)
        try:
            with rw.route(self.model, [slot]):  # refuses what cannot go a row at a time
                adapter.size = loaded_bytes(self.model, slot)
        except Exception:
            rw.detach(self.model, slot)
            raise
        adapter.slot = slot
        self._loaded[adapter] = None
        return True

    def _make_room(self, directory: Path) -> bool:
        numbers = sum(entry.numbers for entry in tensor_entries(directory / TENSORS).values())
        size = numbers * fp32_or_finer(self.model.dtype).itemsize
        if size > self.max_bytes:
            raise AdapterTooLarge(
                f"{directory}: takes {size:,} bytes in memory, more than the {self.max_bytes:,} that are set aside for "
                f"adapters: start the server with more --adapter-memory, or make it smaller with `rankwise squeeze`"
            )
        idle = (adapter for adapter in self.loaded if not adapter.users)
        while len(self._loaded) >= self.max_count or sum(each.size for each in self._loaded) + size > self.max_bytes:
            leaving = next(idle, None)
            if leaving is None:
                return False
            self._drop(leaving)
        return True

    def _drop_if_retired(self, adapter: ServedAdapter) -> None:
        if adapter.retired and not adapter.users and adapter.slot is not None:
            self._drop(adapter)

    def _drop(self, adapter: ServedAdapter) -> None:
        assert adapter.slot is not None and not adapter.users
        rw.detach(self.model, adapter.slot)
        adapter.slot, adapter.size = None, 0
        del self._loaded[adapter]


def loaded_bytes(model: PreTrainedModel, slot: str) -> int:
    """What an adapter on a model takes."""
    adapted = Adapted.of(model)
    layers = adapted.adapter_layers(slot).values()
    tensors = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    return sum(tensor.nbytes for tensor in (*tensors, *adapted.whole_tensors(slot).values()))


def check_directory(directory: Path) -> None:
    """Look into an adapter's directory without trusting it, and before the model is touched.

    Raises:
        CheckpointError: ``rankwise inspect`` has found a problem. UnsupportedAdapter: it is a classifier's.
    """
    problems = inspect(directory).problems
    if problems:
        more = f", and {len(problems) - 1} more: see `rankwise inspect {directory}`" if problems[1:] else ""
        raise CheckpointError(f"{problems[0]}{more}")
    refuse_classifier(directory)


def named_directories(arguments: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Names and directories of adapters, as they are typed: ``DIR``, ``name=DIR``, or a directory of such directories.

    Raises:
        RequestError: there is no such directory, or no adapter in it; two have one name.
    """
    taken: dict[str, Path] = {}
    for argument in arguments:
        for name, directory in _adapters_at(argument):
            if name in taken:
                raise RequestError(
                    f"--adapters: {taken[name]} and {directory} would both be served as {name!r}: give one of them "
                    f"another name, NAME={directory}"
                )
            taken[name] = directory
            yield name, directory


def directory_of(argument: str) -> tuple[str | None, Path]:
    """The name, if one is given, and the directory of ``DIR`` or ``name=DIR``."""
    name, separator, directory = argument.partition("=")
    return (name, Path(directory)) if separator and not Path(argument).exists() else (None, Path(argument))


def _adapters_at(argument: str) -> Iterator[tuple[str, Path]]:
    name, directory = directory_of(argument)
    if not directory.is_dir():
        raise RequestError(f"--adapters: {directory}: no such directory; expected an adapter's, or one of adapters'")
    inside = [path for path in sorted(directory.iterdir()) if (path / CONFIG).is_file()]
    if (directory / CONFIG).is_file() or not inside:
        yield name or directory.resolve().name, directory
    elif name is not None:
        raise RequestError(f"--adapters: {argument}: one name for {len(inside)} adapters; name each by itself")
    else:
        yield from ((path.name, path) for path in inside)


def check_confined(directory: Path, roots: Iterable[Path]) -> None:
    """Refuse a directory that does not lie in one of some others, links followed.

    Raises:
        RequestError: it lies elsewhere.
    """
    inside = directory.resolve()
    if not any(inside.is_relative_to(root.resolve()) for root in roots):
        raise RequestError(
            f"lora_path: {directory} lies in no directory that was given with --adapters: move it there, or start the "
            f"server with --load-from-anywhere"
        )
