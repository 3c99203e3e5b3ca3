"""Samples → token ids, and labels that hold those to be learnt.

What a tokenizer puts before a text (BOS) is there once, whether or not the text brings it along: a chat template
writes it itself, and so do files of rendered chats. What ends a text (EOS) is there once too, and is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from rankwise.train.data.answers import answers
from rankwise.train.data.chat import ChatTemplate, Conversation, Span

if TYPE_CHECKING:
    from datasets import Dataset

ROW = "rankwise_row"
IGNORED = -100

Prompt = str | Conversation


def tokenised(samples: Dataset, tokenizer: PreTrainedTokenizerBase, turns: str = "all") -> Dataset:
    """``input_ids``, ``labels`` and each sample's number, from 1, so that one dropped on the way can be named.

    Args:
        turns: which of the assistant's messages are learnt, `"all"` or the `"last"`.

    Raises:
        DataError: a conversation that the chat template cannot render whole, or whose answers cannot be told.
    """
    encode = encoder(samples.column_names, tokenizer, turns)

    def numbered(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        ids, labels = encode(row)
        return {"input_ids": ids, "labels": labels, ROW: index + 1}

    # Without a fingerprint given, datasets makes one of all that the function refers to, the tokenizer too.
    return samples.map(numbered, with_indices=True, remove_columns=samples.column_names, new_fingerprint=uuid4().hex)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, list[int]]:
    """What asks a model for its next words: the text, and its tokens.

    Raises:
        DataError: the chat template refuses the conversation, or there is none.
    """
    if isinstance(prompt, str):
        return prompt, _once(_before(tokenizer), _ids(tokenizer, prompt))
    text = ChatTemplate(tokenizer).render(prompt, prompt=True)
    return text, _ids(tokenizer, text)


def text_for(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """A prompt as a text that the tokenizer, by itself, makes the tokens of :func:`prompt_ids` of."""
    text, ids = prompt_ids(tokenizer, prompt)
    before = _before(tokenizer)
    return text.removeprefix(str(tokenizer.decode(before))) if before and ids[: len(before)] == before else text


def encoder(
    columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, turns: str = "all"
) -> Callable[[Mapping[str, Any]], tuple[list[int], list[int]]]:
    """What makes token ids and labels of a sample with these columns."""
    if "messages" in columns:
        template = ChatTemplate(tokenizer)
        return lambda row: labelled(tokenizer, *answers(template, Conversation.of(row), turns))
    before, end = _before(tokenizer), tokenizer.eos_token_id

    def whole(text: str, start: int) -> tuple[list[int], list[int]]:
        ids, labels = labelled(tokenizer, text, [(start, len(text))])
        kept = _once(before, ids)
        labels = [IGNORED] * (len(kept) - len(ids)) + labels
        return (kept, labels) if labels[-1:] == [end] else ([*kept, end], [*labels, end])

    if "prompt" in columns:
        return lambda row: whole(row["prompt"] + row["completion"], len(row["prompt"]))
    return lambda row: whole(row["text"], 0)


def labelled(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """A text's tokens, without any that it does not hold, and the labels that learn those of the spans.

    A token that lies in a span only in part is learnt.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    labels, before = [], 0
    for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
        # Some tokenizers leave spaces out of a token's place: they are the token's that follows or consists of them.
        begin = min(start, before)
        learnt = any(first < end and begin < last for first, last in spans)
        labels.append(token if learnt else IGNORED)
        before = max(before, end)
    return ids, labels


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: BOS, or nothing."""
    bare, full = _ids(tokenizer, "a"), tokenizer("a")["input_ids"]
    before: list[int] = full[: next(place for place in range(len(full)) if full[place:][: len(bare)] == bare)]
    return before


def _once(before: list[int], ids: list[int]) -> list[int]:
    return ids if ids[: len(before)] == before else before + ids
