"""A JSONL or parquet file, or a built-in data set → records of one form.

The form is read off the fields of the first record; every other record must have the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from rankwise.errors import DataError
from rankwise.methods import nearest
from rankwise.train.data.formats import (
    FORMATS,
    Record,
    detect,
    fields_of,
    normalised,
    same_types,
    shortened,
    wrong_type,
)
from rankwise.train.data.kjv import kjv_records
from rankwise.train.data.movie_reviews import movie_review_records


def load_records(source: str | Path, *, data_format: str = "auto", held_out: bool = False) -> tuple[str, list[Record]]:
    """Read a file or a built-in data set.

    Args:
        source: a name from `BUILT_IN`, or a path that ends in .jsonl or .parquet.
        data_format: a name from `FORMATS`, or `"auto"`.
        held_out: of a built-in data set, the held-out part. A file has one part.

    Returns:
        The format's name, and the records in the form that TRL takes.
    """
    if data_format != "auto" and data_format not in FORMATS:
        raise DataError(
            f"data_format: expected auto or one of {', '.join(FORMATS)}, found {data_format!r}"
            f"{nearest(data_format, FORMATS)}."
        )
    name = None if data_format == "auto" else data_format
    records: list[Record] = []
    first = ""
    for place, record in _read(source, held_out):
        first = first or place
        form = detect(record, place) if data_format == "auto" else data_format
        name = name or form
        if form != name:
            raise DataError(
                f"{place}: expected the {name} form, as in {first}, found the {form} form (fields: "
                f"{fields_of(record)}). One file holds one form: split it, or bring its records into one."
            )
        records.append(normalised(name, record, place))
        same_types(records[0], records[-1], first, place)
    if name is None or not records:
        raise DataError(f"{source}: expected at least one record, found none: the file is empty.")
    return name, records


BUILT_IN: dict[str, Callable[..., list[Record]]] = {"kjv": kjv_records, "movie-reviews": movie_review_records}


def _read(source: str | Path, held_out: bool) -> Iterator[tuple[str, Record]]:
    """(where it stands, record) of each record."""
    if str(source) in BUILT_IN:
        return _numbered(str(source), BUILT_IN[str(source)](held_out=held_out))
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"{source}: expected an existing .jsonl or .parquet file or a built-in data set ({', '.join(BUILT_IN)}), "
            f"found no such file{nearest(str(source), BUILT_IN)}."
        )
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: expected a file that ends in {' or '.join(_READERS)}, found {path.suffix!r}.")
    return reader(path)


def _numbered(name: str, records: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    return ((f"{name}, record {number}", record) for number, record in enumerate(records, 1))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():  # an empty line holds no record; the numbers count it
                place = f"{path}, line {number}"
                yield place, _parse(line, place)


def _parse(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: expected UTF-8, found the byte {line[error.start]:#04x}. Re-encode the file."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: expected one JSON object, found {shortened(line.decode())}: {error.msg} at column {error.colno}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: expected one JSON object of ordinary size, found {shortened(line.decode())}: {error}"
        ) from None
    if not isinstance(record, dict):
        raise wrong_type(place, "a JSON object with named fields", record)
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: expected text, found half of a surrogate pair ({error}); re-encode the file"
        ) from None
    return record


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        records: list[Record] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: expected a parquet file, found: {error}") from error
    return _numbered(str(path), records)


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
