"""Data sets of the hub that the recipes which come with rankwise train on, by short names.

They are read through the library datasets: from its cache, or from the hub where there is a network. How samples are
worded is LoRA-GA's experiments' (https://github.com/Outsider565/LoRA-GA, reproduce/data.py); what those leave out for
being too long is cut by `max_length` here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rankwise.errors import DataError

Record = dict[str, Any]


@dataclass(frozen=True)
class HubData:
    """One of them.

    Attributes:
        repository, configuration: as datasets names it.
        splits: those to train on and to hold out; None where it has no second one.
        record: a row as a record of a form; None of one that is left out.
    """

    repository: str
    configuration: str | None
    splits: tuple[str, str | None]
    record: Callable[[Record], Record | None]

    def records(self, name: str, *, held_out: bool) -> Iterator[Record]:
        """The records of a part.

        Raises:
            DataError: it has no such part, or is neither in the cache nor to be reached.
        """
        split = self.splits[held_out]
        if split is None:
            raise DataError(f"{name}: has no held-out part; expected eval_split or eval_data in the recipe")
        import datasets

        try:
            rows = datasets.load_dataset(self.repository, self.configuration, split=split)
        except Exception as error:  # the hub's client and a dozen readers, each with errors of its own
            load = ", ".join(map(repr, filter(None, (self.repository, self.configuration))))
            raise DataError(
                f"{name}: expected the data set {self.repository} in the cache of the library datasets, or a network "
                f"to fetch it over, found: {type(error).__name__}. Where there is one, run: python -c "
                f'"import datasets; datasets.load_dataset({load})", and bring the cache ($HF_HOME) here'
            ) from error
        return (record for row in rows if (record := self.record(row)) is not None)


def _labelled(row: Record, *, instruction: str, fields: Sequence[str], labels: Sequence[str]) -> Record:
    text = "\n".join(row[field] for field in fields)
    return {"prompt": f"classify the {instruction}: {text}\nresult: ", "completion": labels[row["label"]]}


def _glue(name: str, instruction: str, fields: Sequence[str], labels: Sequence[str], held_out: str) -> HubData:
    record = partial(_labelled, instruction=instruction, fields=fields, labels=labels)
    return HubData("nyu-mll/glue", name, ("train", held_out), record)


def _metamath(row: Record) -> Record | None:
    """The questions that grew out of GSM8K's."""
    if "GSM" not in row["type"]:
        return None
    return {"prompt": f"Q: {row['query']}\nA: ", "completion": row["response"].split("\nThe answer is:")[0]}


def _gsm8k(row: Record) -> Record:
    return {"prompt": f"Q: {row['question']}\nA: ", "completion": row["answer"]}


def _wizard(row: Record) -> Record | None:
    answer = row["output"].lower()
    refused = "sorry" in answer or "as an ai" in answer
    return None if refused else {"instruction": row["instruction"], "output": row["output"]}


def _code(row: Record) -> Record | None:
    """The answer up to the end of its first block of code."""
    parts = row["answer"].split("```")
    return None if len(parts) < 2 else {"instruction": row["query"], "output": "```".join(parts[:2]) + "```"}


def _messages(row: Record) -> Record:
    return {"messages": row["messages"]}


_SIMILAR = "semantic similarity of the text"
HUB: dict[str, HubData] = {
    "glue-mnli": _glue(
        "mnli",
        _SIMILAR,
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "validation_matched",
    ),
    "glue-sst2": _glue("sst2", "sentiment of the text", ("sentence",), ("negative", "positive"), "validation"),
    "glue-cola": _glue(
        "cola", "grammaticality of the text", ("sentence",), ("unacceptable", "acceptable"), "validation"
    ),
    "glue-qnli": _glue(
        "qnli",
        "semantic similarity of the question and the sentence",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        "validation",
    ),
    "glue-mrpc": _glue("mrpc", _SIMILAR, ("sentence1", "sentence2"), ("different", "equivalent"), "validation"),
    "metamath": HubData("meta-math/MetaMathQA", None, ("train", None), _metamath),
    "gsm8k": HubData("openai/gsm8k", "main", ("train", "test"), _gsm8k),
    "wizardlm": HubData("silk-road/Wizard-LM-Chinese-instruct-evol", None, ("train", None), _wizard),
    "code-feedback": HubData("m-a-p/CodeFeedback-Filtered-Instruction", None, ("train", None), _code),
    "no-robots": HubData("HuggingFaceH4/no_robots", None, ("train", "test"), _messages),
}
