"""`task: preference`: a language model learns which answers are preferred, or another model learns to tell them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rankwise as rw
from rankwise.errors import DataError, RecipeError
from rankwise.report.history import points
from rankwise.train.data import preferences, preflight
from rankwise.train.data.labels import save_labels
from rankwise.train.data.tokens import ROW
from rankwise.train.model.generation import Sample
from rankwise.train.model.pretrained import load_classifier
from rankwise.train.recipe import Recipe
from rankwise.train.task_fields import PREFERENCE_LOSSES, losses
from rankwise.train.tasks.base import DataSummary, Figures, Loaded, Task, spec_of
from rankwise.train.tasks.causal_lm import answered, load_language_model

if TYPE_CHECKING:
    from datasets import Dataset

    from rankwise.train.data.dataset import Batch, Data
    from rankwise.train.trainer.progress import ProgressBar
    from rankwise.train.trainer.trainer import AdapterTrainer

_REWARD = "reward"  # the one label of a reward model


class Pairs(Task):
    """Trained by TRL's `DPOTrainer`."""

    loss_unit = "mean over pairs"

    def load(self, recipe: Recipe) -> Loaded:
        return load_language_model(recipe)

    def check(self, loaded: Loaded, data: Data) -> None:
        _check_form(data, loaded.recipe, "preference")
        preflight.check_reached(loaded.model, loaded.sites)
        preflight.check_tokenizer(loaded.tokenizer)

    def trainer(self, loaded: Loaded, data: Data, bar: ProgressBar) -> tuple[AdapterTrainer, list[str]]:
        from rankwise.train.trainer.preference import PairTrainer, pair_config

        train, held_out, warnings = _pairs(loaded, data)
        return PairTrainer(
            model=loaded.model,
            args=pair_config(loaded.recipe, has_eval=held_out is not None),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=loaded.tokenizer,
            callbacks=[bar],
            recipe=loaded.recipe,
        ), warnings

    def summary(self, loaded: Loaded, data: Data, trainer: AdapterTrainer, batches: Sequence[Batch]) -> DataSummary:
        return _summary(loaded, data, trainer.train_dataset, ("chosen_ids", "rejected_ids"))

    def sample(self, loaded: Loaded, held_out: Dataset | None) -> Sample | None:
        return answered(loaded, held_out)

    def metrics(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        return _rewards(history, "rewards/accuracies", "rewards/margins")

    def figures(self, metrics: dict[str, Any]) -> Figures:
        return _figures(metrics)

    def save(self, loaded: Loaded, adapter: Path) -> None:
        pass


class Unpaired(Task):
    """Trained by TRL's `KTOTrainer`, on answers that are desirable or not; pairs are taken apart."""

    loss_unit = "mean over answers"

    def load(self, recipe: Recipe) -> Loaded:
        return load_language_model(recipe)

    def check(self, loaded: Loaded, data: Data) -> None:
        _check_form(data, loaded.recipe, "unpaired-preference", "preference")
        preflight.check_reached(loaded.model, loaded.sites)
        preflight.check_tokenizer(loaded.tokenizer)

    def trainer(self, loaded: Loaded, data: Data, bar: ProgressBar) -> tuple[AdapterTrainer, list[str]]:
        from rankwise.train.trainer.preference import UnpairedTrainer, unpaired_config

        (train, warnings), held_out = _answers(loaded, data.train, "training"), None
        preferences.check_labels_differ(train)
        if data.eval is not None:
            held_out, more = _answers(loaded, data.eval, "held-out")
            warnings += more
        return UnpairedTrainer(
            model=loaded.model,
            args=unpaired_config(loaded.recipe, has_eval=held_out is not None),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=loaded.tokenizer,
            callbacks=[bar],
            recipe=loaded.recipe,
        ), warnings

    def summary(self, loaded: Loaded, data: Data, trainer: AdapterTrainer, batches: Sequence[Batch]) -> DataSummary:
        summary = _summary(loaded, data, trainer.train_dataset, ("completion_ids",))
        counts = Counter(trainer.train_dataset["label"])
        labels = {"labels": f"desirable: {counts[True]:,}, undesirable: {counts[False]:,}"}
        return replace(summary, facts={**summary.facts, **labels})

    def sample(self, loaded: Loaded, held_out: Dataset | None) -> Sample | None:
        sample = answered(loaded, held_out)
        if sample is None or held_out is None or held_out[0].get("desirable", 1):
            return sample
        return replace(sample, reference=None)

    def metrics(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        return _rewards(history, None, "rewards/margins")

    def figures(self, metrics: dict[str, Any]) -> Figures:
        return _figures(metrics)

    def save(self, loaded: Loaded, adapter: Path) -> None:
        pass


class RewardModel(Task):
    """Trained by TRL's `RewardTrainer`: one output in the place of words, its head trained whole."""

    loss_unit = "nats per pair"

    def load(self, recipe: Recipe) -> Loaded:
        if recipe.quantization != "none":
            raise RecipeError(
                f"`quantization`: expected none with loss reward, found {recipe.quantization}: its new head would be "
                f"quantised before it is trained"
            )
        model, tokenizer, head = load_classifier(recipe.model, [_REWARD], dtype=recipe.dtype, seed=recipe.seed)
        whole = list(dict.fromkeys([*recipe.modules_to_save, *head]))
        spec = spec_of(recipe.model_copy(update={"modules_to_save": whole}))
        planned = rw.plan(model, spec, method=recipe.init_method, memory_budget=recipe.memory_budget)
        return Loaded(recipe, model, tokenizer, spec, planned)

    def check(self, loaded: Loaded, data: Data) -> None:
        _check_form(data, loaded.recipe, "preference")
        preflight.check_tokenizer(loaded.tokenizer)

    def trainer(self, loaded: Loaded, data: Data, bar: ProgressBar) -> tuple[AdapterTrainer, list[str]]:
        from rankwise.train.trainer.preference import RewardModelTrainer, reward_config

        train, held_out, warnings = _pairs(loaded, data)
        longest = loaded.recipe.max_length
        return RewardModelTrainer(
            model=loaded.model,
            args=reward_config(loaded.recipe, has_eval=held_out is not None),
            train_dataset=preferences.with_prompts(train, longest),
            eval_dataset=None if held_out is None else preferences.with_prompts(held_out, longest),
            processing_class=loaded.tokenizer,
            callbacks=[bar],
            recipe=loaded.recipe,
        ), warnings

    def summary(self, loaded: Loaded, data: Data, trainer: AdapterTrainer, batches: Sequence[Batch]) -> DataSummary:
        return _summary(loaded, data, trainer.train_dataset, ("chosen_ids", "rejected_ids"))

    def sample(self, loaded: Loaded, held_out: Dataset | None) -> Sample | None:
        return None

    def metrics(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        return _rewards(history, "accuracy", "margin")

    def figures(self, metrics: dict[str, Any]) -> Figures:
        return _figures(metrics)

    def save(self, loaded: Loaded, adapter: Path) -> None:
        save_labels(adapter, [_REWARD])


_KINDS: dict[str, Task] = {"pairs": Pairs(), "unpaired": Unpaired(), "reward": RewardModel()}


def preference_task(recipe: Recipe) -> Task:
    """What a recipe's loss on preferences is trained by."""
    return _KINDS[PREFERENCE_LOSSES[losses(recipe.loss)[0]].kind]


def _check_form(data: Data, recipe: Recipe, *forms: str) -> None:
    if data.format not in forms:
        hint = "set loss: kto" if data.format == "unpaired-preference" else "rename its fields, or set another task"
        raise DataError(
            f"the recipe's task is preference with the loss {losses(recipe.loss)[0]}: expected data of the form "
            f"{' or '.join(forms)} (fields prompt, {_FIELDS[forms[0]]}), found the {data.format} form; {hint}."
        )


_FIELDS = {"preference": "chosen and rejected", "unpaired-preference": "completion and label"}


def _pairs(loaded: Loaded, data: Data) -> tuple[Dataset, Dataset | None, list[str]]:
    """Tokenised training and held-out pairs, without those that say nothing, which the warnings name."""
    train, warnings = _checked(
        loaded, preferences.tokenised_pairs(data.train, loaded.tokenizer), data.train, "training"
    )
    if data.eval is None:
        return train, None, warnings
    tokens = preferences.tokenised_pairs(data.eval, loaded.tokenizer)
    held_out, more = _checked(loaded, tokens, data.eval, "held-out")
    return train, held_out, warnings + more


def _answers(loaded: Loaded, samples: Dataset, what: str) -> tuple[Dataset, list[str]]:
    """Tokenised single answers in the order of training, since KTO takes each with its neighbour's."""
    recipe = loaded.recipe
    if "rejected" in samples.column_names:
        samples = preferences.unpaired(samples)
    answers, warnings = _checked(loaded, preferences.tokenised_unpaired(samples, loaded.tokenizer), samples, what)
    mixed = answers.shuffle(seed=recipe.seed)
    return preferences.with_kl_completions(mixed, recipe.per_device_train_batch_size), warnings


def _checked(loaded: Loaded, prepared: Dataset, samples: Dataset, what: str) -> tuple[Dataset, list[str]]:
    longest = loaded.recipe.max_length
    kept, warnings = preferences.usable(prepared, samples, what, longest)
    preflight.check_fits(_sequences(kept, longest), what, loaded.model, loaded.tokenizer)
    return kept, [*preferences.check_answers(samples, what), *warnings]


def _sequences(prepared: Dataset, longest: int | None) -> Iterator[tuple[int, list[int]]]:
    """The number of each sample with what the model reads of it."""
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in prepared.column_names]
    for row in prepared:
        for name in answers:
            yield row[ROW], (row["prompt_ids"] + row[name])[:longest]


def _summary(loaded: Loaded, data: Data, prepared: Dataset, answers: Sequence[str]) -> DataSummary:
    longest = loaded.recipe.max_length
    lengths = [max(len(row["prompt_ids"]) + len(row[name]) for name in answers) for row in prepared]
    cut = 0 if longest is None else sum(length > longest for length in lengths)
    shown = {
        "pairs" if len(answers) > 1 else "answers": f"{len(prepared):,}",
        "longest sample": f"{max(lengths)} tokens",
        "cut at max_length": f"{cut} samples" if longest is not None else "no limit",
    }
    if data.unread:
        shown["fields not used"] = ", ".join(data.unread)
    rows = prepared.select(range(min(3, len(prepared))))
    return DataSummary(shown, [_pieces(loaded, row, answers) for row in rows])


def _pieces(loaded: Loaded, row: dict[str, Any], answers: Sequence[str]) -> list[tuple[str, bool]]:
    """A sample as text: what is to be preferred stands out, what is not follows after a cross."""
    prompt, first, *others = (str(loaded.tokenizer.decode(row[name])) for name in ("prompt_ids", *answers))
    preferred = row.get("label", True)
    mark = "" if preferred else " ✗ "
    return [(prompt, False), (f"{mark}{first}", preferred), *((f"\n ✗ {other}", False) for other in others)]


def _rewards(history: list[dict[str, Any]], accuracy: str | None, margin: str) -> dict[str, Any]:
    """How often the chosen answer has the higher reward, and by how much, at the end: held out, or in training."""
    found: dict[str, Any] = {}
    for name, key in (("reward_accuracy", accuracy), ("reward_margin", margin)):
        for prefix in ("eval_", ""):
            _, values = points(history, f"{prefix}{key}")
            if values and name not in found:
                found |= {name: values[-1], "rewards_of": "held-out" if prefix else "training"}
    return found


def _figures(metrics: dict[str, Any]) -> Figures:
    shown = {"reward_accuracy": ("reward accuracy", "{:.1%}"), "reward_margin": ("reward margin", "{:.4g}")}
    return {
        f"{metrics['rewards_of']} {label}": ("", form.format(metrics[name]))
        for name, (label, form) in shown.items()
        if name in metrics
    }
