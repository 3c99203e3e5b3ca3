"""What must hold before a run spends time: there is something to learn from, and it reaches the adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise as rw
from rankwise.errors import DataError, NoTrainableTokens, TargetError
from rankwise.train.data.tokens import IGNORED, ROW

if TYPE_CHECKING:
    from datasets import Dataset

    from rankwise.train.data.dataset import Data


def check_form(data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
    """The samples must be of a form with text to learn, and the tokenizer fit for it."""
    if data.format in _OTHER_TASKS:
        fields, task = _OTHER_TASKS[data.format]
        raise DataError(
            f"the data has the {data.format} form (fields {fields}), the recipe's task is causal-lm: expected text, "
            f"prompt/completion or messages. Set task: {task}, or bring the samples into one of these."
        )
    check_tokenizer(tokenizer)


_OTHER_TASKS = {
    "classification": ("text, label", "classification"),
    "preference": ("chosen, rejected", "preference"),
    "prompt": ("prompt", "grpo"),
    "unpaired-preference": ("prompt, completion, label", "preference"),
}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer must be one that can say where an answer ends, and which characters a token stands for."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer: expected an eos_token, with which answers and texts end, found none: the model would never "
            "learn to stop. Set eos_token in its tokenizer_config.json."
        )
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer: expected one that says which characters a token stands for, found "
            f"{type(tokenizer).__name__}, which does not. Save it with a tokenizer.json (a fast tokenizer)."
        )


def check_labels(
    prepared: Dataset, given: Dataset, what: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[str]:
    """Compare the tokenised samples with the given ones.

    Returns a warning when some samples have no trained token.

    Raises:
        NoTrainableTokens: none has.
    """
    rows, labels = prepared[ROW], prepared["labels"]
    trained = {row for row, sample in zip(rows, labels, strict=True) if any(label != IGNORED for label in sample)}
    lost = [row for row in range(1, len(given) + 1) if row not in trained]
    if not lost:
        return []
    cause = _cause(given[lost[0] - 1], tokenizer, max_length)
    share = f"{len(lost)} of {len(given)} {what} samples ({len(lost) / len(given):.0%}; the first is sample {lost[0]})"
    if trained:
        return [f"{share} have every label masked and are left out. {cause}"]
    raise NoTrainableTokens(f"{share} have every label masked: expected tokens to train on, found none. {cause}")


def numbered(prepared: Dataset, column: str = "input_ids") -> Iterator[tuple[int, list[int]]]:
    """The number of each sample, as it stands in the data, with its tokens."""
    numbers = prepared[ROW] if ROW in prepared.column_names else range(1, len(prepared) + 1)
    return zip(numbers, prepared[column], strict=True)


def check_fits(
    samples: Iterable[tuple[int, list[int]]], what: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The model must have a row for each token, the one that pads too, and a place for it.

    Args:
        samples: the number of each, and its tokens.

    Raises:
        DataError: names the first sample that does not fit.
    """
    rows, positions = model.get_input_embeddings().weight.shape[0], learned_positions(model)
    if (pad := tokenizer.pad_token_id) is not None and pad >= rows:
        raise DataError(
            f"the tokenizer: expected a pad_token with a row in the model's embedding ({rows} rows), found "
            f"{tokenizer.pad_token!r}, number {pad}. Choose one that the model has."
        )
    for number, ids in samples:
        if (largest := max(ids, default=0)) >= rows:
            raise DataError(
                f"{what} sample {number}: expected tokens with a row in the model's embedding ({rows} rows), found "
                f"{tokenizer.decode([largest])!r}, number {largest}. Use the tokenizer that belongs to the model, or "
                "resize its embedding and save it."
            )
        if positions is not None and len(ids) > positions:
            raise DataError(
                f"{what} sample {number}: expected at most {positions} tokens, the positions that the model has "
                f"learned, found {len(ids)}. Set max_length: {positions}."
            )


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has learned; None where it computes them, as by RoPE or ALiBi, and has no end.

    They lie beside the embedding of the tokens: GPT-2's `wpe`, OPT's `embed_positions`, BERT's `position_embeddings`.
    """
    tokens = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is tokens)
    beside = model.get_submodule(path.rpartition(".")[0]).named_children()
    for name, module in beside:
        if isinstance(module, nn.Embedding) and module is not tokens and ("pos" in name or name == "wpe"):
            # RoBERTa counts from behind the number that pads; OPT has rows that it says are no positions.
            counted = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            said: int = getattr(model.config.get_text_config(), "max_position_embeddings", counted)
            return min(counted, said)
    return None


def check_reached(model: PreTrainedModel, sites: Sequence[rw.Site]) -> None:
    """Refuse an adapter on the output head: TRL multiplies by the head's weight past the layer's forward."""
    head = model.get_output_embeddings()
    for site in sites:
        if model.get_submodule(site.name) is head:
            raise TargetError(
                f"{site.name}: the training loss is computed from this layer's weight directly, so an adapter on it "
                "would never be trained. Add it to exclude_modules, or train it in full with modules_to_save."
            )


@dataclass(frozen=True)
class DataFacts:
    """What a tokenised data set holds.

    Attributes:
        samples, tokens: how many.
        trained: tokens that the loss is taken on.
        longest: sample, in tokens.
        full: samples as long as max_length, most of them cut.
        ends: samples with a trained end token.
    """

    samples: int
    tokens: int
    trained: int
    longest: int
    full: int
    ends: int


def data_facts(prepared: Dataset, ends: Collection[int], max_length: int | None) -> DataFacts:
    """Count a tokenised data set; ``ends`` are the tokens that end an answer."""
    lengths, trained, ended = [], 0, 0
    for labels in prepared["labels"]:
        lengths.append(len(labels))
        trained += sum(label != IGNORED for label in labels)
        ended += any(label in ends for label in labels)
    full = 0 if max_length is None else sum(length >= max_length for length in lengths)
    return DataFacts(len(lengths), sum(lengths), trained, max(lengths, default=0), full, ended)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends an answer: the tokenizer's end token, and those at which the model stops writing."""
    stops = getattr(model.generation_config, "eos_token_id", None)
    listed = stops if isinstance(stops, list) else [stops]
    return {token for token in (tokenizer.eos_token_id, *listed) if token is not None}


def check_ends(
    facts: DataFacts,
    batches: Iterable[Mapping[str, Tensor]],
    ends: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answers: bool,
) -> list[str]:
    """A model that never learns to end an answer writes on and on.

    Args:
        answers: whether the samples have answers; running text need not end.

    Returns:
        Warnings.

    Raises:
        DataError: no answer trains an end token, or padding hides those that do.
    """
    name = tokenizer.eos_token
    if not facts.ends:
        if not answers:
            return [f"No sample trains an end token ({name}): the model will not learn to stop."]
        raise DataError(
            f"no answer of the {facts.samples} samples trains an end token ({name}): expected one at the end of each, "
            f"or the model would never learn to stop; {facts.full} samples are cut at max_length. Raise it, or let the "
            "chat template end an answer with the tokenizer's eos_token."
        )
    hidden = all(not _any_of(batch["labels"], ends) for batch in batches)
    if hidden and facts.ends == facts.samples:
        raise DataError(
            f"every sample ends with {name}, but in the batches it is never trained: the padding token is "
            f"{tokenizer.pad_token} and hides it. Give the tokenizer a pad_token of its own."
        )
    return []


def _any_of(labels: Tensor, ends: Collection[int]) -> bool:
    return any(bool((labels == end).any()) for end in ends)


def decoded(prepared: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[tuple[str, bool]]]:
    """The first samples as (text, whether it is trained on) pieces."""
    return [
        _pieces(row["input_ids"], row["labels"], tokenizer) for row in prepared.select(range(min(count, len(prepared))))
    ]


def _pieces(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    groups = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [(str(tokenizer.decode([token for token, _ in members])), trained) for trained, members in groups]


def _cause(sample: dict[str, object], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> str:
    prompt = sample.get("prompt")
    if isinstance(prompt, str) and max_length is not None:
        length = len(tokenizer(prompt)["input_ids"])
        return f"That sample's prompt alone has {length} tokens, max_length is {max_length}: raise it, or cut prompts."
    return "Raise max_length, or check that the samples have answers to learn."
