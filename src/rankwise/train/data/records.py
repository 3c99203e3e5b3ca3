"""Files, or a built-in data set → records of one form.

The form is read off the fields of the first record; every other record must have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from rankwise.errors import DataError
from rankwise.methods import nearest
from rankwise.train.data.files import Placed, Record, read_file
from rankwise.train.data.formats import FORMATS, detect, fields_of, normalised, same_types, unread_fields
from rankwise.train.data.kjv import kjv_records
from rankwise.train.data.movie_reviews import movie_review_records

BUILT_IN: dict[str, Callable[..., list[Record]]] = {"kjv": kjv_records, "movie-reviews": movie_review_records}


@dataclass(frozen=True)
class Records:
    """Records of one form.

    Attributes:
        format: its name in `FORMATS`.
        unread: fields of the first one that its form does not look at.
        rows: (where it stands, record as it is tokenised) of each, read when asked for, and once.
    """

    format: str
    unread: tuple[str, ...]
    rows: Iterator[Placed]


def read_records(source: str | list[str], *, data_format: str = "auto", held_out: bool = False) -> Records:
    """Read files or a built-in data set, one record at a time.

    Args:
        source: a name from `BUILT_IN`, a path, or several.
        data_format: a name from `FORMATS`, or `"auto"`.
        held_out: the held-out part of what has several: a built-in data set, or splits that were saved together.

    Raises:
        DataError: no such source, or no record in it; while reading, a record that is not of the form of the others.
    """
    if data_format != "auto" and data_format not in FORMATS:
        raise DataError(
            f"data_format: expected auto or one of {', '.join(FORMATS)}, found {data_format!r}"
            f"{nearest(data_format, FORMATS)}."
        )
    sources = [source] if isinstance(source, str) else source
    rows = chain.from_iterable([_read(name, held_out) for name in sources])
    first = next(rows, None)
    if first is None:
        raise DataError(f"{', '.join(sources) or 'data'}: expected at least one record, found none: the file is empty.")
    place, record = first
    name = detect(record, place) if data_format == "auto" else data_format
    alike = _alike(name, chain([first], rows), detected=data_format == "auto")
    return Records(name, tuple(unread_fields(name, record)), alike)


def _alike(name: str, rows: Iterable[Placed], *, detected: bool) -> Iterator[Placed]:
    first: Placed | None = None
    for place, record in rows:
        form = detect(record, place) if detected else name
        if first is not None and form != name:
            raise DataError(
                f"{place}: expected the {name} form, as in {first[0]}, found the {form} form (fields: "
                f"{fields_of(record)}). One file holds one form: split it, or bring its records into one."
            )
        row = normalised(name, record, place)
        first = first or (place, row)
        same_types(first[1], row, first[0], place)
        yield place, row


def _read(source: str, held_out: bool) -> Iterator[Placed]:
    """(where it stands, record) of each record."""
    if source in BUILT_IN:
        records = BUILT_IN[source](held_out=held_out)
        return ((f"{source}, record {number}", record) for number, record in enumerate(records, 1))
    return read_file(source, held_out=held_out, others=BUILT_IN)
