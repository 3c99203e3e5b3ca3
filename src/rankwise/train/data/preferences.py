"""Preferences → token ids as TRL's trainers take them, and what must hold of them before a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from rankwise.errors import DataError, NoTrainableTokens
from rankwise.train.data.tokens import IGNORED, ROW, encoder

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]


def tokenised_pairs(samples: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and each sample's number, from 1.

    The prompt ends where the tokens of the two differ, if that is before the answers begin: a token may reach over.

    Raises:
        DataError: a conversation that the chat template cannot render whole.
    """
    encode = encoder(samples.column_names, tokenizer)

    def numbered(row: Row, index: int) -> dict[str, Any]:
        (chosen, start), (rejected, other) = (_answered(encode(answer)) for answer in _both(row))
        shared = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
        start = min(start, other, shared)
        answers = {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
        return {**answers, ROW: index + 1}

    return _mapped(samples, numbered)


def tokenised_unpaired(samples: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """``prompt_ids``, ``completion_ids``, ``label`` and each sample's number, from 1.

    Raises:
        DataError: as for :func:`tokenised_pairs`.
    """
    encode = encoder(samples.column_names, tokenizer)

    def numbered(row: Row, index: int) -> dict[str, Any]:
        ids, start = _answered(encode(row))
        label = bool(row["desirable"])
        return {"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": label, ROW: index + 1}

    return _mapped(samples, numbered)


def unpaired(samples: Dataset) -> Dataset:
    """Pairs as two samples each, the chosen answer desirable and the rejected one not."""
    from datasets import concatenate_datasets

    def of(place: int) -> Dataset:
        def one(row: Row) -> dict[str, Any]:
            return {**_both(row)[place], "desirable": 1 - place}

        return samples.map(one, remove_columns=["rejected"], new_fingerprint=uuid4().hex)

    return concatenate_datasets([of(0), of(1)])


def with_kl_completions(prepared: Dataset, batch_size: int) -> Dataset:
    """``KL_completion_ids``: in each batch, the completion of the sample before, the first one's from its last.

    KTO measures with them how far the model is from its base, as TRL does.
    """

    def rotated(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        completions = rows["completion_ids"]
        return {"KL_completion_ids": [completions[-1], *completions[:-1]]}

    return prepared.map(rotated, batched=True, batch_size=batch_size, new_fingerprint=uuid4().hex)


def usable(prepared: Dataset, samples: Dataset, what: str, max_length: int | None) -> tuple[Dataset, list[str]]:
    """The samples that say something: the others are left out, and named in warnings.

    Args:
        prepared: what :func:`tokenised_pairs` or :func:`tokenised_unpaired` made of the samples.

    Raises:
        NoTrainableTokens: no sample is left.
    """
    checks = _checks(prepared.column_names, max_length)
    lost: dict[str, list[int]] = {reason: [] for reason in checks}
    kept: list[int] = []
    for index, row in enumerate(prepared):
        reason = next((reason for reason, is_fine in checks.items() if not is_fine(row)), None)
        (kept if reason is None else lost[reason]).append(index)
    said = [
        f"{len(rows)} of {len(prepared)} {what} samples {reason}; the first is {samples[rows[0]]['place']}"
        for reason, rows in lost.items()
        if rows
    ]
    if not kept:
        raise NoTrainableTokens(f"{'. '.join(said)}: none is left to train on.")
    return prepared.select(kept), [f"{text}. They are left out." for text in said]


def _checks(columns: Sequence[str], max_length: int | None) -> dict[str, Callable[[Row], bool]]:
    """What is wrong with a sample → whether it is not so."""
    prompts: dict[str, Callable[[Row], bool]] = {
        f"have a prompt that fills max_length ({max_length})": lambda row: (
            max_length is None or len(row["prompt_ids"]) < max_length
        )
    }
    if "rejected_ids" not in columns:
        return prompts

    def differs_before_end(row: Row) -> bool:
        room = None if max_length is None else max_length - len(row["prompt_ids"])
        return bool(row["chosen_ids"][:room] != row["rejected_ids"][:room])

    return {
        "have a rejected answer equal to the chosen one": lambda row: row["chosen_ids"] != row["rejected_ids"],
        **prompts,
        f"differ only beyond max_length ({max_length})": differs_before_end,
    }


def with_prompts(prepared: Dataset, max_length: int | None) -> Dataset:
    """Pairs whose answers bring the prompt along, as a reward model reads them, cut to what it may read."""

    def joined(row: Row) -> dict[str, Any]:
        return {name: (row["prompt_ids"] + row[name])[:max_length] for name in ("chosen_ids", "rejected_ids")}

    # The prompt stays beside them for whoever shows a sample; the answers there are whole.
    return prepared.map(joined, new_fingerprint=uuid4().hex)


def check_answers(samples: Dataset, what: str) -> list[str]:
    """Say how many answers are empty, which a model can learn to give."""
    names = [name for name in ("completion", "rejected") if name in samples.column_names]
    empty = [row["place"] for row in samples if any(not row[name].strip() for name in names)]
    if not empty:
        return []
    return [f"{len(empty)} of {len(samples)} {what} samples have an empty answer; the first is {empty[0]}."]


def check_labels_differ(prepared: Dataset) -> None:
    """Refuse training data whose samples are all desirable, or none.

    Raises:
        DataError: as it says.
    """
    desirable = sum(prepared["label"])
    if desirable in (0, len(prepared)):
        raise DataError(
            f"label: expected desirable completions (true) and undesirable ones (false), found {desirable} and "
            f"{len(prepared) - desirable}: there is nothing to tell apart. Add samples of the other kind."
        )


def _both(row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sample with its chosen answer, and with its rejected one."""
    ending = "messages" if "messages" in row else "completion"
    kept = {name: value for name, value in row.items() if name != "rejected"}
    return kept, {**kept, ending: row["rejected"]}


def _answered(encoded: tuple[list[int], list[int]]) -> tuple[list[int], int]:
    """Token ids, and how many of them come before the answer."""
    ids, labels = encoded
    return ids, next((index for index, label in enumerate(labels) if label != IGNORED), len(ids))


def _mapped(samples: Dataset, function: Callable[[Row, int], dict[str, Any]]) -> Dataset:
    # Without a fingerprint given, datasets makes one of all that the function refers to, the tokenizer too.
    return samples.map(function, with_indices=True, remove_columns=samples.column_names, new_fingerprint=uuid4().hex)
