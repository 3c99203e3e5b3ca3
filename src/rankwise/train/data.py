"""Training data: a JSONL or parquet file, or a built-in name → records in a form that a trainer takes.

The form is read off the fields of the first record; every other record must have the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from pyarrow import parquet

from rankwise.errors import DataError
from rankwise.methods import nearest
from rankwise.train.kjv import kjv_records
from rankwise.train.movie_reviews import movie_review_records
from rankwise.train.recipe import Recipe

Record = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One form that training data comes in.

    Attributes:
        fields: the fields that make a record of this form.
        normalise: (record, where it stands) → the record as TRL takes it.
        loss: the fields of `SFTConfig` that take the loss where it belongs.
    """

    fields: tuple[str, ...]
    normalise: Callable[[Record, str], Record]
    loss: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """What a run learns from, and what it is judged on."""

    train: Dataset
    eval: Dataset | None
    format: str

    @property
    def loss(self) -> dict[str, bool]:
        """The fields of `SFTConfig` that take the loss on the answers only."""
        return dict(FORMATS[self.format].loss)


def load_data(recipe: Recipe) -> Data:
    """The training and held-out samples that a recipe asks for, the same ones for the same seed.

    A built-in data set brings its own held-out part, used unless the recipe names another.

    Raises:
        DataError: a file cannot be read, or a record is not of the form of the others.
    """
    name, records = load_records(recipe.data, data_format=recipe.data_format)
    train, held_out = Dataset.from_list(records), None
    if recipe.eval_data is not None:
        held_out = _held_out_part(recipe.eval_data, name)
    elif recipe.eval_split is not None:
        train, held_out = _split(train, recipe.eval_split, recipe)
    elif recipe.data in BUILT_IN:
        held_out = _held_out_part(recipe.data, name)
    train = _at_most(recipe.max_train_samples, train, recipe.seed)
    if held_out is not None:
        held_out = _at_most(recipe.max_eval_samples, held_out, recipe.seed)
    return Data(train, held_out, name)


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
    for where, record in _read(source, held_out):
        first = first or where
        found = _detect(record, where) if data_format == "auto" else data_format
        name = name or found
        if found != name:
            raise DataError(
                f"{where}: expected the {name} form, as in {first}, found the {found} form (fields: {_keys(record)}). "
                "One file holds one form: split it, or bring its records into one."
            )
        records.append(_normalised(name, record, where))
        _same_types(records[0], records[-1], first, where)
    if name is None or not records:
        raise DataError(f"{source}: expected at least one record, found none: the file is empty.")
    return name, records


def _held_out_part(source: str, data_format: str) -> Dataset:
    """Held-out samples are of the form of the training samples."""
    return Dataset.from_list(load_records(source, data_format=data_format, held_out=True)[1])


def _split(samples: Dataset, size: float | int, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Hold out a number or a share of the samples, at least one."""
    count = size if isinstance(size, int) else max(1, round(size * len(samples)))
    if count >= len(samples):
        raise DataError(
            f"{recipe.data}: eval_split asks for {count} samples, the file has {len(samples)}: nothing would be left "
            "to train on. Lower eval_split, or give eval_data."
        )
    parts = samples.train_test_split(test_size=count, seed=recipe.seed)
    return parts["train"], parts["test"]


def _at_most(count: int | None, samples: Dataset, seed: int) -> Dataset:
    """A random choice, so that a file in some order is not known by its beginning only."""
    return samples if count is None or count >= len(samples) else samples.shuffle(seed=seed).select(range(count))


# --- reading -------------------------------------------------------------------------------------------------------

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
                where = f"{path}, line {number}"
                yield where, _parse(line, where)


def _parse(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, found the byte {line[error.start]:#04x}. Re-encode the file."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: expected one JSON object, found {_short(line.decode())}: {error.msg} at column {error.colno}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected one JSON object of ordinary size, found {_short(line.decode())}: {error}"
        ) from None
    if not isinstance(record, dict):
        raise _wrong(where, "a JSON object with named fields", record)
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected text, found half of a surrogate pair ({error}); re-encode the file"
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

# --- forms ---------------------------------------------------------------------------------------------------------


def _messages(record: Record, where: str) -> Record:
    messages = _chat(record["messages"], f"{where}: messages")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{where}: messages: expected at least one message of the assistant to learn from, found none.")
    return {"messages": messages}


def _prompt_completion(record: Record, where: str) -> Record:
    take = _string if isinstance(record["prompt"], str) else _chat
    return {key: take(record[key], f"{where}: {key}") for key in ("prompt", "completion")}


def _text(record: Record, where: str) -> Record:
    return {"text": _string(record["text"], f"{where}: text")}


def _alpaca(record: Record, where: str) -> Record:
    """Stanford Alpaca's own prompt."""
    instruction, answer = (_string(record[key], f"{where}: {key}") for key in ("instruction", "output"))
    given = _string(record.get("input") or "", f"{where}: input")
    context, input_part = (", paired with an input that provides further context", f"### Input:\n{given}\n\n")
    prompt = (
        f"Below is an instruction that describes a task{context if given else ''}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{input_part if given else ''}### Response:\n"
    )
    return {"prompt": prompt, "completion": answer}


def _classification(record: Record, where: str) -> Record:
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise _wrong(f"{where}: label", "a whole number or a string", label)
    pair = record.get("text_pair")
    return {
        "text": _string(record["text"], f"{where}: text"),
        "text_pair": None if pair is None else _string(pair, f"{where}: text_pair"),
        "label": label,
    }


# In the order in which they are looked for: `text` is last, since the others often bring one along.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages, {"assistant_only_loss": True}),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, {"completion_only_loss": True}),
    "alpaca": Format(("instruction", "output"), _alpaca, {"completion_only_loss": True}),
    "classification": Format(("text", "label"), _classification),
    "text": Format(("text",), _text),
}


def _detect(record: Record, where: str) -> str:
    for name, form in FORMATS.items():
        if all(key in record for key in form.fields):
            return name
    known = "; ".join(f"{name} ({', '.join(form.fields)})" for name, form in FORMATS.items())
    raise DataError(f"{where}: expected the fields of a known form: {known}. Found the fields {_keys(record)}.")


def _normalised(name: str, record: Record, where: str) -> Record:
    form = FORMATS[name]
    if missing := [key for key in form.fields if key not in record]:
        raise DataError(
            f"{where}: expected the fields {', '.join(form.fields)} of the {name} form, found {_keys(record)}: "
            f"{', '.join(missing)} is missing."
        )
    return form.normalise(record, where)


def _same_types(first: Record, record: Record, first_where: str, where: str) -> None:
    """A field is of one type throughout: text or a chat, numbered or named labels."""
    for key, value in record.items():
        expected, found = (_TYPES[type(each)] for each in (first[key], value))
        if found != expected:
            raise DataError(f"{where}: {key}: expected {expected}, as in {first_where}, found {found}.")


_TYPES: dict[type, str] = {
    str: "a string",
    list: "a list of messages",
    int: "a whole number",
    type(None): "nothing",
}


def _chat(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _wrong(where, "a list of messages, at least one", value)
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        raise _wrong(where, 'an object with exactly "role" and "content"', value)
    return {key: _string(value[key], f"{where}.{key}") for key in ("role", "content")}


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "a string", value)
    return value


def _wrong(where: str, expected: str, found: Any) -> DataError:
    return DataError(f"{where}: expected {expected}, found {type(found).__name__}: {_short(found)}.")


def _keys(record: Record) -> str:
    return ", ".join(record) or "(none)"


def _short(value: Any) -> str:
    text = repr(value.strip() if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
