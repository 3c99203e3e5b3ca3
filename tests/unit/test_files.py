"""Files as people have them: each kind gives the values that stand in it, and what is broken is named."""

import bz2
import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Json, Value
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rankwise.errors import DataError
from rankwise.train.data.dataset import load_data
from rankwise.train.data.files import read_file
from rankwise.train.recipe import Recipe, flag_value

# What readers like to guess at: dates, numbers, missing values, line ends, quotes, marks of Unicode.
TEXTS = ["2020-01-01", "007", "1e5", "NA", "null", "", "True", 'a "b", c\n\td;', "x\u2028y\x85z", "ü🙂", " a "]
ROWS = [{"prompt": text, "completion": text[::-1]} for text in TEXTS]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[Any], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def columns(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[Any], open_writer: Callable[..., Any]) -> bytes:
    sink, written = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with open_writer(sink, written.schema) as writer:
        writer.write_table(written)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "x.jsonl": lines,
    "x.JSONL": lines,
    "x.ndjson": lines,
    "lines.json": lines,
    "x.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: b"\n" + json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "marked.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(),
    "x.csv": lambda rows: table(rows, ","),
    "marked.csv": lambda rows: b"\xef\xbb\xbf" + table(rows, ","),
    "x.Tsv": lambda rows: table(rows, "\t"),
    "x.parquet": columns,
    "stream.arrow": lambda rows: arrow(rows, pyarrow.ipc.new_stream),
    "file.arrow": lambda rows: arrow(rows, pyarrow.ipc.new_file),
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_values_that_stand_in_it(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / (name + ending)
    path.write_bytes(COMPRESSED[ending](WRITERS[name](ROWS)))
    assert [record for _, record in read_file(str(path))] == ROWS


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst"])
def test_pieces_that_were_compressed_apart_are_one_file(ending: str, tmp_path: Path) -> None:
    """What `cat a.gz b.gz`, pigz and pzstd make."""
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(b"".join(COMPRESSED[ending](lines([row])) for row in ROWS))
    assert [record for _, record in read_file(str(path))] == ROWS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=3), max_size=5), st.integers(1, 40)
)
def test_an_array_is_read_piece_by_piece(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], chunk: int
) -> None:
    """Wherever the pieces end: within a text, a number, a character of several bytes."""
    path = tmp_path_factory.mktemp("data") / "x.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1 if chunk % 2 else None), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankwise.train.data.files._CHUNK", chunk)
        assert [record for _, record in read_file(str(path))] == records


def test_a_large_array_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("w") as file:
        file.write("[" + ",".join(json.dumps({"text": "a" * 1000}) for _ in range(30_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_file(str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 30_000
    assert peak < path.stat().st_size / 4


# --- several files, and directories ----------------------------------------------------------------------------------


def recipe(data: Any, **fields: Any) -> Recipe:
    return Recipe(model="m", data=data, **fields)


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:3]))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(table(ROWS[3:], ",")))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv.gz")]
    data = load_data(recipe(files, eval_data=files[:1]))
    assert list(data.train["prompt"]) == TEXTS
    assert list(data.eval["prompt"]) == TEXTS[:3]
    assert data.train[3]["place"] == f"{files[1]}, line 2"
    assert recipe(files).data_name == "a, b"
    assert flag_value("data", "a.jsonl") == "a.jsonl"
    assert flag_value("data", "[a.jsonl, b.csv.gz]") == ["a.jsonl", "b.csv.gz"]
    with pytest.raises(DataError, match=r"c\.jsonl: expected an existing file"):
        load_data(recipe([*files, "c.jsonl"]))


def test_a_saved_data_set(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    data = load_data(recipe(str(tmp_path / "saved")))
    assert list(data.train["prompt"]) == TEXTS
    assert data.train[1]["place"] == f"{tmp_path / 'saved'}, record 2"


def test_a_selection_is_saved_as_it_was_selected(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).select([4, 0]).save_to_disk(str(tmp_path / "saved"))
    assert [record for _, record in read_file(str(tmp_path / "saved"))] == [ROWS[4], ROWS[0]]


def test_saved_splits(tmp_path: Path) -> None:
    parts = {"train": ROWS[:5], "test": ROWS[5:]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(str(tmp_path / "saved"))
    data = load_data(recipe(str(tmp_path / "saved"), eval_data=str(tmp_path / "saved")))
    assert (list(data.train["prompt"]), list(data.eval["prompt"])) == (TEXTS[:5], TEXTS[5:])
    DatasetDict({"all": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(DataError, match="expected a split named train, found all"):
        load_data(recipe(str(tmp_path / "other")))


LABELS = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})


@pytest.mark.parametrize("kind", ["saved", "x.parquet"])
def test_labels_keep_their_names(kind: str, tmp_path: Path) -> None:
    samples = Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}], features=LABELS)
    if kind == "saved":
        samples.save_to_disk(str(tmp_path / kind))
    else:
        samples.to_parquet(tmp_path / kind)
    data = load_data(recipe(str(tmp_path / kind), task="classification"))
    assert list(data.train["label"]) == ["good", "bad"]


def test_messages_of_arrow_have_their_own_fields_only(tmp_path: Path) -> None:
    """A column of objects gives each of them the fields of all: null is what it lacks."""
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    other = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [each]}]}
        for each in (call, other)
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    for source in ("saved", "x.parquet"):
        assert [record for _, record in read_file(str(tmp_path / source))] == rows


def test_json_columns_are_read(tmp_path: Path) -> None:
    tools = [[{"name": "clock", "parameters": {"default": 1}}], [{"name": "add", "parameters": {"x": "y"}}]]
    samples = Dataset.from_dict({"tools": tools}, features=Features({"tools": Json()}))
    samples.save_to_disk(str(tmp_path / "saved"))
    samples.to_parquet(tmp_path / "x.parquet")
    for source in ("saved", "x.parquet"):
        assert [record["tools"] for _, record in read_file(str(tmp_path / source))] == tools


def test_labels_of_a_table_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    from rankwise.train.tasks.classification import _label_names

    assert _label_names({"10", "9", "-1"}, "x") == ["-1", "9", "10"]
    assert _label_names({10, 9}, "x") == ["9", "10"]
    assert _label_names({"b", "10", "9"}, "x") == ["10", "9", "b"]


# --- broken files ----------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, bytes, str]] = {
    "cut gzip": ("x.jsonl.gz", gzip.compress(lines(ROWS) * 50)[:-20], "expected a file that is whole"),
    "no gzip": ("x.jsonl.gz", lines(ROWS), "expected a file that is whole"),
    "cut zstd": ("x.csv.zst", COMPRESSED[".zst"](table(ROWS * 50, ","))[:-9], "expected a file that is whole"),
    "cut parquet": ("x.parquet", columns(ROWS)[:-9], "expected a file that is whole"),
    "cut arrow": ("x.arrow", arrow(ROWS, pyarrow.ipc.new_stream)[:200], "expected a file that is whole"),
    "cut array": ("x.json", b'[{"text": "a"}, {"text": "b', "record 2: expected a JSON object, found"),
    "array without its end": ("x.json", b'[{"text": "a"}', "record 1: expected a comma or the array's end"),
    "array of texts": ("x.json", b'["a"]', "record 1: expected a JSON object with named fields, found str"),
    "one object over several lines": ("x.json", b'{\n"text": "a"\n}', "line 1: expected one JSON object"),
    "not UTF-8": ("x.csv", b"text\n\xff\xfe", "expected UTF-8, found the byte 0xff"),
    "array not in UTF-8": ("x.json", b'[{"text": "\xff"}]', "expected UTF-8, found the byte 0xff"),
    "row too long": ("x.csv", b"text,label\na,b,c\n", "line 2: expected 2 fields.*text, label.*found 3"),
    "row too short": ("x.csv", b"text,label\na\n", "line 2: expected 2 fields.*found 1"),
    "open quote": ("x.csv", b'text\n"a\n', "line 2: expected a row of a table, found: unexpected end of data"),
    "a name twice": ("x.csv", b"text,text\na,b\n", "line 1: expected the names of the fields, each once"),
    "semicolons": ("x.csv", b"text;label\na;b\n", r"expected the fields of a known form.*text;label"),
    "another's directory": ("x/readme.txt", b"", "expected a directory that datasets' save_to_disk wrote"),
    "a cut saved data set": ("x/data.arrow", b"", "expected a directory that datasets' save_to_disk wrote"),
    "no ending": ("x", b"", "found 'no ending'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        load_data(recipe(str(tmp_path / Path(name).parts[0])))
    assert str(tmp_path) in str(refused.value)


def test_a_saved_data_set_that_is_cut_is_named(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match="saved"):
        load_data(recipe(str(tmp_path / "saved")))


@pytest.mark.parametrize("content", ["{", "[]", "null", "3", '{"features": 3}', '{"_data_files": [{"filename": 3}]}'])
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_saved_data_set_with_other_json_is_named(name: str, content: str, tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / name).write_text(content)
    try:
        assert list(load_data(recipe(str(tmp_path / "saved"))).train["prompt"]) == TEXTS  # what it says is not needed
    except DataError as error:
        assert "saved: expected a directory that datasets' save_to_disk wrote" in str(error)


def test_pictures_are_refused_and_not_decoded(tmp_path: Path) -> None:
    features = Features({"prompt": Value("string"), "completion": Value("string"), "image": Image()})
    row = {"prompt": "a", "completion": "b", "image": {"bytes": b"no picture", "path": None}}
    Dataset.from_list([row], features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="image: found"):
        load_data(recipe(str(tmp_path / "saved")))


def test_one_long_field_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    ((_, record),) = read_file(str(path))
    assert len(record["text"]) == 200_000
