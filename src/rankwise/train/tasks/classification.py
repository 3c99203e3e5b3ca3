"""`task: classification`: an encoder, or any other model, learns which label a text, or a pair of texts, has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise as rw
from rankwise.errors import DataError, RecipeError
from rankwise.report.history import points
from rankwise.train.data import preflight
from rankwise.train.data.labels import save_labels
from rankwise.train.data.records import read_records
from rankwise.train.model.generation import Sample
from rankwise.train.model.pretrained import load_classifier
from rankwise.train.recipe import Recipe, TrainingFields
from rankwise.train.tasks.base import DataSummary, Figures, Loaded, Task, spec_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from rankwise.train.data.dataset import Batch, Data
    from rankwise.train.trainer.progress import ProgressBar
    from rankwise.train.trainer.trainer import AdapterTrainer


class Classification(Task):
    """Trained by transformers' `Trainer`; the new head is trained whole and saved beside the adapter."""

    loss_unit = "nats"

    def load(self, recipe: Recipe) -> Loaded:
        records = read_records(recipe.data, data_format=recipe.data_format)
        _check_form(records.format)
        if recipe.quantization != "none":
            raise RecipeError(
                f"`quantization`: expected none with task classification, found {recipe.quantization}: its new "
                f"head would be quantised before it is trained"
            )
        model, tokenizer, head = load_classifier(
            recipe.model,
            _label_names({row["label"] for _, row in records.rows}, recipe.data_name),
            dtype=recipe.dtype,
            seed=recipe.seed,
        )
        whole = list(dict.fromkeys([*recipe.modules_to_save, *head]))
        spec = spec_of(recipe.model_copy(update={"modules_to_save": whole}))
        planned = rw.plan(model, spec, method=recipe.init_method, memory_budget=recipe.memory_budget)
        return Loaded(recipe, model, tokenizer, spec, planned)

    def check(self, loaded: Loaded, data: Data) -> None:
        _check_form(data.format)
        known = loaded.model.config.label2id
        for row in [] if data.eval is None else data.eval:
            if str(row["label"]) not in known:
                raise DataError(
                    f"held-out data: expected the labels of the training data ({', '.join(known)}), found "
                    f"{row['label']!r}. Remove those samples, or add some with that label to the training data."
                )
        if loaded.tokenizer.pad_token_id is None:
            raise DataError(
                f"{loaded.recipe.model}: expected a tokenizer with a padding token, since texts of different lengths "
                "stand in one batch, found none. Set pad_token in its tokenizer_config.json."
            )

    def trainer(self, loaded: Loaded, data: Data, bar: ProgressBar) -> tuple[AdapterTrainer, list[str]]:
        from transformers import DataCollatorWithPadding

        from rankwise.train.trainer.trainer import ClassifierTrainer, training_arguments

        recipe = loaded.recipe
        trainer = ClassifierTrainer(
            model=loaded.model,
            args=training_arguments(recipe.section(TrainingFields), seed=recipe.seed, has_eval=data.eval is not None),
            train_dataset=_tokenised(loaded, data.train),
            eval_dataset=None if data.eval is None else _tokenised(loaded, data.eval),
            processing_class=loaded.tokenizer,
            data_collator=DataCollatorWithPadding(loaded.tokenizer),
            compute_metrics=_accuracy,
            preprocess_logits_for_metrics=_predicted,
            callbacks=[bar],
            recipe=recipe,
        )
        preflight.check_fits(preflight.numbered(trainer.train_dataset), "training", loaded.model, loaded.tokenizer)
        if data.eval is not None:
            preflight.check_fits(preflight.numbered(trainer.eval_dataset), "held-out", loaded.model, loaded.tokenizer)
        return trainer, []

    def summary(self, loaded: Loaded, data: Data, trainer: AdapterTrainer, batches: Sequence[Batch]) -> DataSummary:
        counts = Counter(data.train["label"])
        labels = ", ".join(f"{label}: {count:,}" for label, count in counts.most_common())
        rows = data.train.select(range(min(3, len(data.train))))
        texts = (" | ".join(text for text in (row["text"], row["text_pair"]) if text) for row in rows)
        pieces = [[(text, False), (f"  → {row['label']}", True)] for text, row in zip(texts, rows, strict=True)]
        return DataSummary({"samples": f"{len(data.train):,}", "labels": labels}, pieces)

    def sample(self, loaded: Loaded, held_out: Dataset | None) -> Sample | None:
        """The first held-out text, with the model's label for it and how sure it is."""
        if held_out is None:
            return None
        row = held_out[0]
        inputs = _encode(loaded, [row["text"]], [row["text_pair"]])
        with rw.disabled(loaded.model):
            before = _answer(loaded.model, inputs)
        shown = " | ".join(text for text in (row["text"], row["text_pair"]) if text is not None)
        return Sample(shown, before, _answer(loaded.model, inputs), str(row["label"]))

    def metrics(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        _, accuracies = points(history, "eval_accuracy")
        return {"accuracy_before": accuracies[0], "accuracy_after": accuracies[-1]} if accuracies else {}

    def figures(self, metrics: dict[str, Any]) -> Figures:
        if "accuracy_after" not in metrics:
            return {}
        return {"held-out accuracy": (f"{metrics['accuracy_before']:.1%}", f"{metrics['accuracy_after']:.1%}")}

    def save(self, loaded: Loaded, adapter: Path) -> None:
        names = loaded.model.config.id2label
        save_labels(adapter, [names[index] for index in range(len(names))])


def _check_form(data_format: str) -> None:
    if data_format != "classification":
        raise DataError(
            f"the recipe's task is classification: expected data with the fields text and label, found the "
            f"{data_format} form. Rename its fields, or set task: causal-lm."
        )


def _label_names(found: set[int | str], source: str) -> list[str]:
    """The labels in order: numbers by value, though a table holds them as text, names by alphabet."""
    labels = sorted(map(str, found))
    if all(label.removeprefix("-").isdecimal() for label in labels):
        labels.sort(key=int)
    if len(labels) < 2:
        raise DataError(
            f"{source}: expected samples of two labels at least, found only the label {', '.join(labels)}: there is "
            "nothing to tell apart. Add samples with another label."
        )
    return labels


def _tokenised(loaded: Loaded, samples: Dataset) -> Dataset:
    """Token ids and the number of the label, cut to what the model can read."""
    number = loaded.model.config.label2id

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        labels = [number[str(label)] for label in batch["label"]]
        return {**_encode(loaded, batch["text"], batch["text_pair"]), "labels": labels}

    # Without a fingerprint given, datasets makes one of all that the function refers to: of every weight of the model.
    return samples.map(encode, batched=True, remove_columns=samples.column_names, new_fingerprint=uuid4().hex)


def _encode(loaded: Loaded, texts: list[str], pairs: list[str | None]) -> dict[str, Any]:
    # A field has one type throughout the data, so either all samples are pairs or none is.
    second = None if pairs[0] is None else pairs
    limit = _longest(loaded.recipe, loaded.model, loaded.tokenizer)
    return dict(loaded.tokenizer(texts, second, truncation=limit is not None, max_length=limit))


def _longest(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The recipe's max_length, or less where the model has fewer positions."""
    limits = (
        recipe.max_length,
        getattr(model.config, "max_position_embeddings", None),
        preflight.learned_positions(model),
        tokenizer.model_max_length,
    )
    return min((limit for limit in limits if limit is not None), default=None)


def _predicted(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The likeliest label's number; some models return more than logits."""
    return (logits if isinstance(logits, Tensor) else logits[0]).argmax(-1)


def _accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions == evaluated.label_ids).mean())}


@torch.no_grad()
def _answer(model: PreTrainedModel, inputs: dict[str, Any]) -> str:
    training = model.training
    model.eval()
    try:
        batch = {name: torch.tensor(value, device=model.device) for name, value in inputs.items()}
        chances = model(**batch).logits[0].float().softmax(-1)
    finally:
        model.train(training)
    best = int(chances.argmax())
    return f"{model.config.id2label[best]} ({float(chances[best]):.0%})"
