"""inspect: what is in an adapter directory, without a model, and without trusting any of it.

The header is read before any tensor, then one site's tensors at a time, under the rules that :func:`load` has. What it
would refuse is a problem in the report, never an exception. Nothing here needs torch, unless an adapter is of a kind
that only its variant's own file can tell of.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rankwise.base_probe import read_probes
from rankwise.errors import BrokenFile, MissingTensor, RankwiseError, SpecError, UnsafeFile
from rankwise.files import check_stays_inside, is_pickle, read_json, tensor_entries
from rankwise.format import adalora
from rankwise.format.configuration import (
    check_extra,
    check_supported,
    is_own,
    ranks_and_alphas,
    stated_fields,
    variant_recorded,
)
from rankwise.format.layout import by_site, check_beside, check_pair, pair_names, shared_A, stray
from rankwise.format.names import CONFIG, EMBEDDING_PAIR, EXTRA, OWN, PREFIX, TENSORS, site_and_suffix
from rankwise.inspection.arrays import TensorFile, low_rank_norm, opened
from rankwise.inspection.engines import Traits, Verdict, verdicts
from rankwise.patterns import keys_under
from rankwise.scaling import declared
from rankwise.spec import plain_fields
from rankwise.tensor_header import TensorEntry

T = TypeVar("T")
_RanksAndAlphas = tuple[dict[str, int], dict[str, float]]
_LISTED = 200  # files, and problems, that a report names
_CODE = (".py", ".so", ".sh", ".pyc", ".dll", ".exe", ".ipynb")


@dataclass(frozen=True)
class FileFacts:
    """A file of the directory; ``sha256`` is None where it was not opened."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class SiteFacts:
    """One adapted layer.

    Attributes:
        name: module path.
        kind: "linear", "conv1d", "conv2d" or "embedding"; of an adapter that rankwise alone reads, its variant.
        shape: (out, in) of the weight as one matrix.
        rank, scale: of ΔW = scale · B A; of a bottleneck, its width and 1.
        dtype: of the stored tensors.
        change: ‖ΔW‖_F; None where no pair expresses it, and where it is beyond fp32.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scale: float
    dtype: str
    change: float | None


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        directory: as given.
        files: the files in it.
        peft_type, base_model: as the configuration names them.
        spec: the configuration as a spec's plain data, with the variant that ``rankwise.json`` names where PEFT has no
            word for it; None where it cannot be read as one.
        sites: the adapted layers that are sound.
        replaced: the modules, by name, of which the file brings whole tensors instead of a change.
        parameters: numbers in the file.
        dtypes: type → numbers of it.
        notes: what is worth knowing, but is not refused.
        problems: what :func:`load` would refuse, each with its error's name.
        engines: who reads it right; empty where there are problems.
    """

    directory: str
    files: tuple[FileFacts, ...]
    peft_type: str | None
    base_model: str | None
    spec: dict[str, Any] | None
    sites: tuple[SiteFacts, ...]
    replaced: tuple[str, ...]
    parameters: int
    dtypes: dict[str, int]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    engines: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect(directory: str | Path) -> Inspection:
    """What is in an adapter directory, whoever wrote it.

    Raises:
        BrokenFile: no such directory. Whatever is wrong inside it is in the report.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise BrokenFile(f"{folder}: no such directory; expected an adapter's, with {CONFIG} in it")
    notes: list[str] = []
    problems = _Problems()
    files = tuple(_files(folder, notes))
    config = problems.catch(lambda: read_json(folder / CONFIG)) or {}
    header = problems.catch(lambda: tensor_entries(folder / TENSORS))
    entries = header or {}
    fields: dict[str, Any] | None = None
    spec: dict[str, Any] | None = None
    whole: list[str] = []
    sites: list[SiteFacts] = []
    if is_own(config):
        spec, sites = _own_sites(folder, config, entries, problems)
    elif config:
        fields = problems.catch(lambda: _fields(folder / CONFIG, config))
        spec = None if fields is None else plain_fields({**fields, "variant": _variant(folder, fields, problems)})
    if fields is not None and header is not None:
        whole = keys_under(fields["modules_to_save"], entries)
        with opened(folder / TENSORS, entries) as file:
            problems.catch(lambda: file.check_finite(whole))
            sites = list(_sites(_Reader(folder, config, fields, file), _without(entries, whole), problems))
    replaced = tuple(dict.fromkeys(key.removeprefix(PREFIX).rpartition(".")[0] for key in whole))
    if replaced:
        notes.append(f"replaces whole modules: {', '.join(replaced)}; load(..., modules_to_save=()) refuses that")
    problems.catch(lambda: _check_own_file(folder, config, {site.name for site in sites}))
    return Inspection(
        str(directory),
        files,
        _text(config.get("peft_type")),
        _text(config.get("base_model_name_or_path")),
        spec,
        tuple(sites),
        replaced,
        sum(entry.numbers for entry in entries.values()),
        _numbers_by_dtype(entries),
        tuple(notes),
        problems.listed(),
        () if problems.found else verdicts(_traits(config, sites, replaced)),
    )


class _Problems:
    """What went wrong so far, in words."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def catch(self, read: Callable[[], T]) -> T | None:
        """What ``read`` returns, or None and a problem more."""
        try:
            return read()
        except RankwiseError as error:
            self.found.append(f"{type(error).__name__}: {error}")
            return None

    def listed(self) -> tuple[str, ...]:
        """Each once, as many as one can read."""
        each = list(dict.fromkeys(self.found))
        return (*each[:_LISTED], *([f"and {len(each) - _LISTED} more"] if each[_LISTED:] else []))


def _files(folder: Path, notes: list[str]) -> Iterator[FileFacts]:
    paths = sorted(folder.iterdir())
    if paths[_LISTED:]:
        notes.append(f"{len(paths)} files; the first {_LISTED} are listed")
    for path in paths[:_LISTED]:
        if is_pickle(path):
            notes.append(f"{path.name!r} is a pickle, which can run code when opened; it is not opened here")
        if path.suffix in _CODE:
            notes.append(f"{path.name!r} is code; it is not run here")
        if path.is_dir():
            notes.append(f"{path.name!r} is a directory, which is not looked into")
        elif not path.is_file():
            notes.append(f"{path.name!r} is no plain file, and is not opened")
        else:
            yield _file(path, notes)


def _file(path: Path, notes: list[str]) -> FileFacts:
    size = path.stat().st_size
    try:
        check_stays_inside(path)
        with path.open("rb") as stream:
            return FileFacts(path.name, size, hashlib.file_digest(stream, "sha256").hexdigest())
    except UnsafeFile as error:
        notes.append(str(error))
    except OSError as error:
        notes.append(f"{path.name!r} cannot be read ({error.strerror})")
    return FileFacts(path.name, size, None)


def _fields(where: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    check_supported(where, config)
    if config["peft_type"] == "ADALORA":  # whose rank_pattern lists which directions were kept
        config = {**config, "rank_pattern": {}}
    return stated_fields(where, config)


def _without(entries: Mapping[str, TensorEntry], left_out: Iterable[str]) -> dict[str, TensorEntry]:
    unwanted = set(left_out)
    return {key: entry for key, entry in entries.items() if key not in unwanted}


@dataclass(frozen=True)
class _Reader:
    """Reads the sites of a file; ``fields`` are what its configuration states."""

    folder: Path
    config: Mapping[str, Any]
    fields: Mapping[str, Any]
    file: TensorFile

    @property
    def is_adalora(self) -> bool:
        return bool(self.config["peft_type"] == "ADALORA")

    def site(self, path: str, entries: Mapping[str, TensorEntry], given: _RanksAndAlphas | None) -> SiteFacts:
        """One site, from its tensors; ``given`` are the ranks and alphas of the configuration."""
        where, fields = self.folder / TENSORS, self.fields
        tensors = {name: self.file.array(name) for name in entries}
        if self.is_adalora:
            plain, tensors = adalora.as_lora(self.folder, self.config, tensors)
            fields = stated_fields(self.folder / CONFIG, plain)
            given = ranks_and_alphas(self.folder / CONFIG, fields, [path])
        if given is None:
            raise SpecError(f"{where}: {path}: its rank is not known")
        rank, alpha = given[0][path], given[1][path]
        parts = by_site(where, tensors)[path]
        pair = pair_names(where, path, parts)
        A, B = (parts.pop(name) for name in pair)
        check_beside(where, path, parts, fields["variant"])
        check_pair(where, path, (A.shape, B.shape), (str(A.dtype), str(B.dtype)), rank)
        kind = "embedding" if pair == EMBEDDING_PAIR else "conv2d" if A.ndim == 4 else "linear"
        A = shared_A(where, path, A, rank // B.shape[1])  # a grouped convolution's B has rank/groups columns
        A, B = A.reshape(len(A), -1), B.reshape(len(B), -1)
        scale = declared(fields["scaling"] == "rslora")(alpha, rank)
        norm = low_rank_norm(B, A, scale)
        dtype = ", ".join(sorted({entry.dtype for entry in entries.values()}))
        change = norm if math.isfinite(norm) else None
        return SiteFacts(path, kind, (len(B), A.shape[1]), len(A), scale, dtype, change)


def _sites(reader: _Reader, entries: Mapping[str, TensorEntry], problems: _Problems) -> Iterator[SiteFacts]:
    """The sites that are sound, each read by itself."""
    where = reader.folder / TENSORS
    place = adalora.site_and_suffix if reader.is_adalora else site_and_suffix
    sites: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in entries.items():
        path_and_suffix = place(key)
        if path_and_suffix is None:
            problems.found.append(f"UnexpectedTensor: {stray(where, key, entry)}")
        else:
            sites.setdefault(path_and_suffix[0], {})[key] = entry
    if not sites:
        problems.found.append(f"MissingTensor: {where}: holds no pair of tensors")
        return
    given = None
    if not reader.is_adalora:
        given = problems.catch(lambda: ranks_and_alphas(reader.folder / CONFIG, reader.fields, list(sites)))
    for path, site_entries in sites.items():
        site = problems.catch(partial(reader.site, path, site_entries, given))
        if site is not None:
            yield site


def _variant(folder: Path, fields: Mapping[str, Any], problems: _Problems) -> Any:
    """The variant as plain data, which rankwise.json may know better than PEFT's configuration."""
    recorded = problems.catch(lambda: read_json(folder / EXTRA)) if (folder / EXTRA).is_file() else None
    return variant_recorded(fields["variant"], recorded or {})


def _own_sites(
    folder: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry], problems: _Problems
) -> tuple[dict[str, Any] | None, list[SiteFacts]]:
    """The spec, as plain data, and the sites of a directory that rankwise alone reads."""
    from rankwise.format.own_form import configured, states_by_site  # a method's own file, which needs torch

    spec_and_sites = problems.catch(lambda: configured(folder / CONFIG, config))
    if spec_and_sites is None:
        return None, []
    spec, sites = spec_and_sites
    states = problems.catch(lambda: states_by_site(folder / TENSORS, entries, sites)) or {}
    if entries:
        with opened(folder / TENSORS, entries) as file:
            problems.catch(lambda: file.check_finite(entries))
    variant = str(config["peft_type"]).removeprefix(OWN).lower()
    dtypes = {path: ", ".join(sorted({entry.dtype for entry in state.values()})) for path, state in states.items()}
    facts = [
        SiteFacts(path, variant, site.shape, site.rank, site.scale, dtypes[path], None)
        for path, site in sites.items()
        if path in states
    ]
    return spec.to_dict(), facts


def _check_own_file(folder: Path, config: Mapping[str, Any], sites: set[str]) -> None:
    """rankwise.json, where there is one."""
    where = folder / EXTRA
    if is_own(config):
        read_probes(folder / CONFIG, config)
    elif where.is_file() and sites:
        extra = read_json(where)
        check_extra(where, extra)
        read_probes(where, extra)
        missing = [path for path in extra.get("sites", ()) if path not in sites]
        if missing:
            raise MissingTensor(f"{folder / TENSORS}: no sound pair for {missing[0]}, which {EXTRA} lists")


def _traits(config: Mapping[str, Any], sites: list[SiteFacts], replaced: tuple[str, ...]) -> Traits:
    return Traits(
        str(config.get("peft_type")),
        _text(config.get("base_model_name_or_path")) or "",
        {site.name: site.kind for site in sites},
        max((site.rank for site in sites), default=0),
        len({(site.rank, site.scale) for site in sites}) == 1,
        config.get("use_rslora") is True,
        config.get("use_dora") is True,
        replaced,
    )


def _numbers_by_dtype(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in entries.values():
        found[entry.dtype] = found.get(entry.dtype, 0) + entry.numbers
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
