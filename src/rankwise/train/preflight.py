"""What must hold before a run spends time: there is something to learn from, and it reaches the adapter."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

import rankwise as rw
from rankwise.errors import DataError, NoTrainableTokens, TargetError
from rankwise.train.data import Data

ROW = "rankwise_row"
_IGNORED = -100


def numbered(dataset: Dataset) -> Dataset:
    """The data set with each sample's number, so that the samples dropped on the way can be named."""
    return dataset.add_column(ROW, list(range(1, len(dataset) + 1)))


def check_form(data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
    """The samples must be of a form with text to learn, and chats need a template that marks the answers."""
    if data.format == "classification":
        raise DataError(
            "the data has the classification form (fields text, label), the recipe's task is causal-lm: expected text, "
            "prompt/completion or messages. Set task: classification, or bring the samples into one of these."
        )
    if data.loss.get("assistant_only_loss"):
        _check_template(tokenizer)


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    template = tokenizer.chat_template
    if template is not None and has_generation_markers(template):
        return
    try:
        # TRL knows marked versions of the common families' templates and puts them in.
        get_training_chat_template(tokenizer)
    except (ValueError, TypeError) as error:
        found = "none" if template is None else "one without"
        raise DataError(
            "messages: expected a chat template whose {% generation %} marks say which tokens the assistant wrote, "
            f"found {found} ({error}). Add the marks to the tokenizer's chat_template, or bring the data into the "
            "prompt/completion form."
        ) from None


def check_labels(
    prepared: Dataset, given: Dataset, what: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[str]:
    """Compare the tokenised samples with the given ones.

    Returns a warning when some samples have no trained token.

    Raises:
        NoTrainableTokens: none has.
    """
    rows, labels = prepared[ROW], prepared["labels"]
    trained = {row for row, sample in zip(rows, labels, strict=True) if any(label != _IGNORED for label in sample)}
    lost = [row for row in given[ROW] if row not in trained]
    if not lost:
        return []
    cause = _cause(given[lost[0] - 1], tokenizer, max_length)
    share = f"{len(lost)} of {len(given)} {what} samples ({len(lost) / len(given):.0%}; the first is sample {lost[0]})"
    if trained:
        return [f"{share} have every label masked and are left out. {cause}"]
    raise NoTrainableTokens(f"{share} have every label masked: expected tokens to train on, found none. {cause}")


def check_reached(model: PreTrainedModel, sites: Sequence[rw.Site]) -> None:
    """Refuse an adapter on the output head: TRL multiplies by the head's weight past the layer's forward."""
    head = model.get_output_embeddings()
    for site in sites:
        if model.get_submodule(site.name) is head:
            raise TargetError(
                f"{site.name}: the training loss is computed from this layer's weight directly, so an adapter on it "
                "would never be trained. Add it to exclude_modules, or train it in full with modules_to_save."
            )


def _cause(sample: dict[str, object], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> str:
    prompt = sample.get("prompt")
    if isinstance(prompt, str) and max_length is not None:
        length = len(tokenizer(prompt)["input_ids"])
        return f"That sample's prompt alone has {length} tokens, max_length is {max_length}: raise it, or cut prompts."
    return "Raise max_length, or check that the samples have answers to learn."
