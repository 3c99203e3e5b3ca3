"""transformers' trainer of models with an encoder and a decoder, and the tokens that it trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments

from rankwise.train.data.scores import scores
from rankwise.train.data.tokens import IGNORED, ROW
from rankwise.train.recipe import Recipe, TrainingFields
from rankwise.train.trainer.trainer import AdapterTrainer, arguments, refusals


class TextToTextTrainer(AdapterTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """Trains a model to answer one text with another."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Their forward takes any argument, but not the number of items that accumulated batches hold together.
        self.model_accepts_loss_kwargs = False


def text_to_text_config(recipe: Recipe, *, has_eval: bool) -> Seq2SeqTrainingArguments:
    """Recipe fields as transformers' configuration."""
    with refusals():
        return Seq2SeqTrainingArguments(
            **arguments(recipe.section(TrainingFields), recipe.seed, has_eval),
            predict_with_generate=bool(recipe.answer_metrics),
            generation_max_length=recipe.answer_tokens + 1,  # with the token that the decoder begins with
            generation_num_beams=1,
        )


def tokenised(samples: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """``input_ids`` of the prompt, ``labels`` of the completion with its end token, both cut to ``max_length``."""

    def numbered(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        cut = {"truncation": max_length is not None, "max_length": max_length}
        labels: list[int] = tokenizer(text_target=row["completion"], **cut)["input_ids"]
        if labels[-1:] != [tokenizer.eos_token_id] and (max_length is None or len(labels) < max_length):
            labels = [*labels, tokenizer.eos_token_id]
        return {"input_ids": tokenizer(row["prompt"], **cut)["input_ids"], "labels": labels, ROW: index + 1}

    # Without a fingerprint given, datasets makes one of all that the function refers to, the tokenizer too.
    return samples.map(numbered, with_indices=True, remove_columns=samples.column_names, new_fingerprint=uuid4().hex)


def scorer(metrics: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """What scores the generated tokens of an evaluation."""

    def texts(ids: Any) -> list[str]:
        shown = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
        return list(tokenizer.batch_decode(shown, skip_special_tokens=True))

    return lambda evaluated: scores(metrics, texts(evaluated.predictions), texts(evaluated.label_ids))
