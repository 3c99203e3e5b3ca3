"""A file of training data → its records, one at a time.

Values are as they stand in the file: nothing is guessed to be a number, a date or missing, and no field is added.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from rankwise.errors import DataError
from rankwise.methods import nearest
from rankwise.train.data.messages import shortened, wrong_type

Record = dict[str, Any]
Placed = tuple[str, Record]  # where it stands, and what it holds
Reader = Callable[[Path, str | None], Iterator[Placed]]  # of a path and how it is compressed

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_CHUNK = 1 << 20
_SIGN = re.compile(r"[^ \t\n\r]")
_HELD_OUT = ("validation", "test", "eval", "dev")  # what the held-out part of saved splits is called


def read_file(source: str, *, held_out: bool = False, others: Collection[str] = ()) -> Iterator[Placed]:
    """The records of a file, or of a directory that `save_to_disk` of the library datasets wrote.

    Args:
        held_out: of splits that were saved together, the held-out one.
        others: names that are no files, for the message about one that is not there.

    Raises:
        DataError: no such file, or one that is not what its name says.
    """
    path = Path(source)
    if path.is_dir():
        return _readable(lambda directory, _: _read_saved(directory, held_out), path, None)
    if not path.is_file():
        raise DataError(
            f"{source}: expected an existing file ({', '.join(_READERS)}) or a built-in data set "
            f"({', '.join(others)}), found no such file{nearest(source, others)}."
        )
    endings = [ending.lower() for ending in path.suffixes]
    compression = _COMPRESSIONS.get(endings[-1]) if endings else None
    ending = (endings[:-1] if compression else endings)[-1:]
    if not ending or ending[0] not in _READERS:
        raise DataError(
            f"{source}: expected a file that ends in {', '.join(_READERS)} (or in that and "
            f"{', '.join(_COMPRESSIONS)}), found {''.join(path.suffixes[-2:]) or 'no ending'!r}."
        )
    return _readable(_READERS[ending[0]], path, compression)


def _readable(read: Reader, path: Path, compression: str | None) -> Iterator[Placed]:
    """The records, with what goes wrong below them as errors that name the file."""
    try:
        yield from read(path, compression)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{path}: expected a file that is whole and what its name says, found: {error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, found the byte {error.object[error.start]:#04x}. Re-encode the file."
        ) from None


def _open(path: Path, compression: str | None) -> io.BufferedReader:
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression, buffer_size=_CHUNK))


def _read_lines(path: Path, compression: str | None) -> Iterator[Placed]:
    with _open(path, compression) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():  # an empty line holds no record; the numbers count it
                place = f"{path}, line {number}"
                yield place, _parse(_decoded(line, place), place)


def _read_json(path: Path, compression: str | None) -> Iterator[Placed]:
    """An array of records, or a line for each."""
    with _open(path, compression) as file:
        is_array = file.peek(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    return (_read_array if is_array else _read_lines)(path, compression)


def _read_array(path: Path, compression: str | None) -> Iterator[Placed]:
    """The objects of an array, of which no more is in memory than the one that is read."""
    decoder = json.JSONDecoder()
    with _open(path, compression) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        rest, at = _next_sign("", 0, text)
        rest, at = _next_sign(rest, at + 1, text)
        number = 1
        while not rest.startswith("]", at):
            place = f"{path}, record {number}"
            try:
                record, end = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError) as error:
                if not (more := text.read(max(_CHUNK, len(rest) - at))):
                    raise DataError(
                        f"{place}: expected a JSON object, found {shortened(rest[at:])}: {error}."
                    ) from None
                rest, at = rest[at:] + more, 0
                continue
            yield place, _object(record, place)
            rest, at = _next_sign(rest, end, text)
            if rest[at : at + 1] not in (",", "]"):
                raise DataError(f"{place}: expected a comma or the array's end after it, found {shortened(rest[at:])}.")
            if rest[at] == ",":
                rest, at = _next_sign(rest, at + 1, text)
            number += 1


def _next_sign(rest: str, at: int, text: io.TextIOWrapper) -> tuple[str, int]:
    """Where the next sign stands that is no space: in what was read, or, where that ends, in what is read then."""
    while (sign := _SIGN.search(rest, at)) is None and (more := text.read(_CHUNK)):
        rest, at = more, 0
    return rest, len(rest) if sign is None else sign.start()


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: expected UTF-8, found the byte {line[error.start]:#04x}. Re-encode the file."
        ) from None


def _parse(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: expected one JSON object, found {shortened(line)}: {error.msg} at column {error.colno}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: expected one JSON object of ordinary size, found {shortened(line)}: {error}"
        ) from None
    return _object(record, place)


def _object(record: Any, place: str) -> Record:
    if not isinstance(record, dict):
        raise wrong_type(place, "a JSON object with named fields", record)
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: expected text, found half of a surrogate pair ({error}); re-encode the file"
        ) from None
    return record


def _read_table(delimiter: str) -> Reader:
    """The reader of a table in text, whose first line names the fields and whose values are all strings."""

    def read(path: Path, compression: str | None) -> Iterator[Placed]:
        csv.field_size_limit(sys.maxsize)
        with _open(path, compression) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            try:
                names = next(rows, [])
                _check_names(names, path)
                for row in rows:
                    if row:
                        yield _named(names, row, f"{path}, line {rows.line_num}")
            except csv.Error as error:
                raise DataError(f"{path}, line {rows.line_num}: expected a row of a table, found: {error}.") from None

    return read


def _check_names(names: list[str], path: Path) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{path}, line 1: expected the names of the fields, each once, found {', '.join(names)}.")


def _named(names: list[str], row: list[str], place: str) -> Placed:
    if len(row) != len(names):
        raise DataError(
            f"{place}: expected {len(names)} fields, as the first line names ({', '.join(names)}), found {len(row)}. "
            "Put fields that hold the delimiter or a line's end into quotes."
        )
    return place, dict(zip(names, row, strict=True))


def _read_parquet(path: Path, compression: str | None) -> Iterator[Placed]:
    file = parquet.ParquetFile(pyarrow.BufferReader(_open(path, compression).read()) if compression else path)
    return _rows(str(path), file.schema_arrow, file.iter_batches(batch_size=1000))


def _read_arrow(path: Path, compression: str | None) -> Iterator[Placed]:
    """Arrow's stream, as datasets writes it, or its file with an index."""
    file = _open(path, compression)
    if file.peek(6).startswith(b"ARROW1"):
        table = pyarrow.ipc.open_file(file.read() if compression else pyarrow.memory_map(str(path)))
        return _rows(str(path), table.schema, map(table.get_batch, range(table.num_record_batches)))
    stream = pyarrow.ipc.open_stream(file)
    return _rows(str(path), stream.schema, stream)


def _read_saved(path: Path, held_out: bool) -> Iterator[Placed]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, pyarrow.ArrowException) as error:
        # What its JSON files hold is taken on trust there.
        raise DataError(
            f"{path}: expected a directory that datasets' save_to_disk wrote, found another: {error}. Give the files "
            "in it as a list."
        ) from error
    if isinstance(saved, DatasetDict):
        wanted = _HELD_OUT if held_out else ("train",)
        name = next((name for name in wanted if name in saved), None)
        if name is None:
            raise DataError(
                f"{path}: expected a split named {' or '.join(wanted)}, found {', '.join(saved)}. Give the directory "
                "of the one that is meant."
            )
        path, saved = path / name, saved[name]
    table = saved.with_format("arrow")
    return _rows(
        str(path), saved.features.arrow_schema, (part for rows in table.iter(1000) for part in rows.to_batches())
    )


def _rows(name: str, schema: pyarrow.Schema, batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Placed]:
    """The rows of an Arrow table: a label as the name that its column gives it, JSON as what it says."""
    from datasets import ClassLabel, Features

    try:
        features = Features.from_arrow_schema(schema)
    except ValueError as error:
        raise DataError(
            f"{name}: expected columns of types that the library datasets knows, found: {error}."
        ) from error
    names = {key: kind.names for key, kind in features.items() if isinstance(kind, ClassLabel)}
    encoded = Features({key: features[key] for key in features if _holds_json(schema.field(key).type)})
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            decoded = encoded.decode_example({key: row[key] for key in encoded})
            record = {key: _without_nulls(value) for key, value in row.items()} | decoded
            for key, labels in names.items():
                if record[key] in range(len(labels)):
                    record[key] = labels[record[key]]
            yield f"{name}, record {number}", record


def _holds_json(kind: pyarrow.DataType) -> bool:
    inner = (kind.field(index).type for index in range(kind.num_fields))
    return isinstance(kind, pyarrow.JsonType) or any(map(_holds_json, inner))


def _without_nulls(value: Any) -> Any:
    """A column gives each of its objects the fields that any of them has: those that one lacks are null there."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


_READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
