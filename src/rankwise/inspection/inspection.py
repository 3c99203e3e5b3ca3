"""inspect: what is in an adapter directory, without a model, and without trusting any of it.

The header is read before any tensor, then one site's tensors at a time, under the rules that :func:`load` has. What it
would refuse is a problem in the report, never an exception. Nothing here needs torch, unless an adapter is of a kind
that only its variant's own file can tell of.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rankwise.errors import BrokenFile, RankwiseError, UnsafeFile
from rankwise.files import check_stays_inside, is_pickle, read_json, settled, sha256, tensor_entries
from rankwise.format.configuration import (
    is_adalora,
    is_own,
    read_extra,
    read_unlike_peft,
    relative_start,
    stated_fields,
    variant_recorded,
)
from rankwise.format.layout import SiteReader, by_site, named_whole, stray, whole_keys, whole_tensors
from rankwise.format.names import (
    CONFIG,
    EXTRA,
    FILES,
    OWN,
    PREFIX,
    TENSORS,
    TOKEN_ROWS,
    is_base_copy,
    is_token_rows,
    site_and_suffix,
    whole_name,
)
from rankwise.format.selection import stated_selection
from rankwise.inspection.arrays import TensorFile, low_rank_norm, opened
from rankwise.inspection.engines import verdicts
from rankwise.inspection.engines.rules import Case
from rankwise.inspection.facts import FileFacts, Inspection, SiteFacts
from rankwise.spec import plain_fields
from rankwise.tensor_header import TensorEntry

T = TypeVar("T")
_LISTED = 200  # files, and problems, that a report names
_HASHED_TENSORS, _HASHED = 2**30, 2**26  # bytes of the adapter's tensors, and of any other file
_CODE = (".py", ".so", ".sh", ".pyc", ".dll", ".exe", ".ipynb")


def inspect(directory: str | Path) -> Inspection:
    """What is in an adapter directory, whoever wrote it.

    Raises:
        BrokenFile: no such directory. Whatever is wrong inside it is in the report.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise BrokenFile(f"{folder}: no such directory; expected an adapter's, with {CONFIG} in it")
    return settled(folder, FILES, lambda: _inspect(folder))


def _inspect(folder: Path) -> Inspection:
    notes: list[str] = []
    problems = _Problems()
    files = tuple(_files(folder, notes))
    config = problems.catch(lambda: read_json(folder / CONFIG)) or {}
    header = problems.catch(lambda: tensor_entries(folder / TENSORS))
    entries = header or {}
    fields: dict[str, Any] | None = None
    spec: dict[str, Any] | None = None
    whole: dict[str, None] = {}
    parts: dict[str, dict[str, TensorEntry]] = {}
    sites: list[SiteFacts] = []
    unlike_peft: dict[str, str] = {}
    if is_own(config):
        spec, sites = _own_sites(folder, config, entries, problems, notes)
    elif config:
        fields = problems.catch(lambda: stated_fields(folder / CONFIG, config))
        spec = None if fields is None else plain_fields(fields)
    if fields is not None and header is not None:
        fields = named_whole(fields, entries)
        whole = dict.fromkeys(whole_keys(entries, config, fields))
        changes = {key: entry for key, entry in entries.items() if key not in whole}
        parts = _parts(folder / TENSORS, changes, config, problems)
        problems.catch(lambda: stated_selection(folder / CONFIG, config, fields).check(parts))
        extra, _ = problems.catch(lambda: read_extra(folder, parts)) or ({}, {})
        unlike_peft = problems.catch(lambda: read_unlike_peft(folder / EXTRA, extra)) or {}
        spec = plain_fields({**fields, "variant": variant_recorded(fields["variant"], extra)})
        with opened(folder / TENSORS, entries) as file:
            problems.catch(lambda: file.check_finite(whole))
            problems.catch(lambda: whole_tensors(folder / TENSORS, whole))
            reader = problems.catch(lambda: SiteReader(folder, config, fields, list(parts)))
            sites = [] if reader is None else list(_sites(reader, parts, file, problems))
        notes.extend(_unread(file))
    rows = [key.removeprefix(PREFIX).removesuffix(f".{TOKEN_ROWS}") for key in whole if is_token_rows(key)]
    notes.extend(f"trains single rows of {path}" for path in rows)
    biased = spec is not None and spec["bias"] != "none"
    # An adapted layer's own weight is the base's, or resized.
    beside = [key for key in whole if not is_base_copy(key) or (biased and key.endswith(".bias"))]
    names = [name for key in beside if not is_token_rows(key) and (name := whole_name(key))]
    replaced = tuple(dict.fromkeys([*(name.rpartition(".")[0] for name in names), *rows]))
    if names:
        notes.append(f"replaces whole modules: {', '.join(replaced)}; load(..., modules_to_save=()) refuses that")
    start = relative_start(config)
    if start is not None:
        notes.append(f"its pairs are relative to a base that init_lora_weights {start!r} changed; load finds it again")
    dtypes: Counter[str] = Counter()
    for entry in entries.values():
        dtypes[entry.dtype] += entry.numbers
    facts = Inspection(
        str(folder),
        files,
        _text(config.get("peft_type")),
        _text(config.get("base_model_name_or_path")),
        start,
        None if fields is None else plain_fields(fields),
        tuple(sites),
        replaced,
        dtypes.total(),
        dict(dtypes),
        tuple(notes),
        problems.listed(),
        unlike_peft,
    )
    judged = not problems.messages and (is_own(config) or len(sites) == len(parts))
    engines = verdicts(Case(facts)) if judged else ()  # which go by PEFT's own fields
    return replace(facts, spec=spec, engines=engines)


class _Problems:
    """What went wrong so far, in words."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, error: RankwiseError) -> None:
        """One more."""
        self.messages.append(f"{type(error).__name__}: {error}")

    def catch(self, read: Callable[[], T]) -> T | None:
        """What ``read`` returns, or None and a problem more."""
        try:
            return read()
        except RankwiseError as error:
            self.add(error)
            return None

    def listed(self) -> tuple[str, ...]:
        """Each once, as many as one can read."""
        messages = list(dict.fromkeys(self.messages))
        return (*messages[:_LISTED], *([f"and {len(messages) - _LISTED} more"] if messages[_LISTED:] else []))


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
        if size > (_HASHED_TENSORS if path.name == TENSORS else _HASHED):
            notes.append(f"{path.name!r} has {size} bytes, too many to be hashed here")
            return FileFacts(path.name, size, None)
        return FileFacts(path.name, size, sha256(path))
    except UnsafeFile as error:
        notes.append(str(error))
    except OSError as error:
        notes.append(f"{path.name!r} cannot be read ({error.strerror})")
    return FileFacts(path.name, size, None)


def _parts(
    source: Path, entries: dict[str, TensorEntry], config: Mapping[str, Any], problems: _Problems
) -> dict[str, dict[str, TensorEntry]]:
    """Module path → file suffix → entry; those that are no site's are taken out of the entries."""
    for key in [key for key in entries if site_and_suffix(key, bare_pairs=is_adalora(config)) is None]:
        problems.add(stray(source, key, entries.pop(key)))
    return problems.catch(lambda: by_site(source, entries, config)) or {}


def _sites(
    reader: SiteReader, parts: Mapping[str, Mapping[str, TensorEntry]], file: TensorFile, problems: _Problems
) -> Iterator[SiteFacts]:
    """The sites that are sound, each read by itself."""
    for path, part in parts.items():
        fits = file.takes_site(part.values())
        site = problems.catch(partial(_site, reader, path, part, file)) if fits else None
        if site is not None:
            yield site


def _site(reader: SiteReader, path: str, part: Mapping[str, TensorEntry], file: TensorFile) -> SiteFacts:
    site = reader.site(path, {suffix: file.array(entry.name) for suffix, entry in part.items()})
    norm = low_rank_norm(site.B, site.A, site.scale) if file.takes_norm(site.B, site.A) else math.nan
    change = norm if math.isfinite(norm) and relative_start(reader.config) is None else None
    return SiteFacts(path, site.kind, (len(site.B), site.A.shape[1]), len(site.A), site.scale, _dtypes(part), change)


def _dtypes(part: Mapping[str, TensorEntry]) -> str:
    return ", ".join(sorted({entry.dtype for entry in part.values()}))


def _unread(file: TensorFile) -> Iterator[str]:
    if file.unread:
        yield f"{len(file.unread)} tensors are too many numbers to be looked at here; the first is {file.unread[0]}"


def _own_sites(
    folder: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry], problems: _Problems, notes: list[str]
) -> tuple[dict[str, Any] | None, list[SiteFacts]]:
    """The spec, as plain data, and the sites of a directory that rankwise alone reads."""
    from rankwise.format.own_form import configured, states_by_site  # a method's own file, which needs torch

    configuration = problems.catch(lambda: configured(folder / CONFIG, config))
    if configuration is None:
        return None, []
    spec, sites, _ = configuration
    states = problems.catch(lambda: states_by_site(folder / TENSORS, entries, sites)) or {}
    if entries:
        with opened(folder / TENSORS, entries) as file:
            problems.catch(lambda: file.check_finite(entries))
        notes.extend(_unread(file))
    variant = str(config["peft_type"]).removeprefix(OWN).lower()
    facts = [
        SiteFacts(path, variant, sites[path].shape, sites[path].rank, sites[path].scale, _dtypes(state), None)
        for path, state in states.items()
    ]
    return spec.to_dict(), facts


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
