"""Files, or a built-in data set → records of one form.

The form is read off the fields of the first record; every other record must have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from rankwise.errors import DataError
from rankwise.methods import nearest
from rankwise.train.data.files import Placed, Record, read_file
from rankwise.train.data.formats import FORMATS, detect, fields_of, normalised, same_types, unread_fields
from rankwise.train.data.hub import HUB
from rankwise.train.data.kjv import kjv_pairs, kjv_records
from rankwise.train.data.movie_reviews import movie_review_records, movie_review_texts
from rankwise.train.data.reasoning import PREFIX, reasoning_records

BUILT_IN: dict[str, Callable[..., list[Record]]] = {
    "kjv": kjv_records,
    "kjv-pairs": kjv_pairs,
    "movie-reviews": movie_review_records,
    "movie-reviews-text": movie_review_texts,
}


# What `data` may name beside files.
NAMED = [*BUILT_IN, *HUB]


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


def read_records(
    source: str | list[str], *, data_format: str = "auto", held_out: bool = False, first: Sequence[str] = ()
) -> Records:
    """Read files or a built-in data set, one record at a time.

    Args:
        source: a name from `NAMED`, a path, or several.
        data_format: a name from `FORMATS`, or `"auto"`.
        held_out: the held-out part of what has several: a built-in data set, or splits that were saved together.
        first: with `"auto"`, forms that are looked for before the others.

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
    earliest = next(rows, None)
    if earliest is None:
        raise DataError(f"{', '.join(sources) or 'data'}: expected at least one record, found none: the file is empty.")
    place, record = earliest
    name = detect(record, place, first) if data_format == "auto" else data_format
    alike = _alike(name, chain([earliest], rows), first if data_format == "auto" else None)
    return Records(name, tuple(unread_fields(name, record)), alike)


def _alike(name: str, rows: Iterable[Placed], looked_for: Sequence[str] | None) -> Iterator[Placed]:
    """The rows, all of one form: detected with these before the others, or chosen (None)."""
    first: Placed | None = None
    for place, record in rows:
        form = name if looked_for is None else detect(record, place, looked_for)
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
    if source.startswith(PREFIX):
        made = reasoning_records(source, held_out=held_out)
        return ((f"{source}, record {number}", record) for number, record in enumerate(made, 1))
    if source not in NAMED:
        return read_file(source, held_out=held_out, others=NAMED)
    builds = BUILT_IN.get(source) or partial(HUB[source].records, source)
    return ((f"{source}, record {number}", record) for number, record in enumerate(builds(held_out=held_out), 1))


def has_held_out(source: str) -> bool:
    """Whether a source is a named data set with a part that is not trained on."""
    return source in BUILT_IN or source.startswith(PREFIX) or (source in HUB and HUB[source].splits[True] is not None)
