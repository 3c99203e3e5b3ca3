"""`task: seq2seq`: a model with an encoder and a decoder, such as T5, learns to answer one text with another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import DataError
from rankwise.train.data import preflight
from rankwise.train.model.generation import Sample
from rankwise.train.recipe import Recipe
from rankwise.train.tasks.base import DataSummary, Figures, Loaded, Task, score_changes, score_figures
from rankwise.train.tasks.causal_lm import answered, load_language_model

if TYPE_CHECKING:
    from datasets import Dataset

    from rankwise.train.data.dataset import Batch, Data
    from rankwise.train.trainer.progress import ProgressBar
    from rankwise.train.trainer.trainer import AdapterTrainer


class Seq2Seq(Task):
    """Trained by transformers' `Seq2SeqTrainer`."""

    loss_unit = "nats per token"

    def load(self, recipe: Recipe) -> Loaded:
        return load_language_model(recipe, "seq2seq")

    def check(self, loaded: Loaded, data: Data) -> None:
        columns = data.train.column_names
        if not {"prompt", "completion"} <= {*columns}:
            raise DataError(
                f"the recipe's task is seq2seq: expected a prompt and a completion that are texts, found the "
                f"{data.format} form ({', '.join(columns)}). Bring the samples into the prompt-completion form."
            )
        tokenizer = loaded.tokenizer
        for name, token in (("eos_token", tokenizer.eos_token_id), ("pad_token", tokenizer.pad_token_id)):
            if token is None:
                raise DataError(
                    f"the tokenizer: expected an {name}, with which texts end or are filled up, found none. Set it in "
                    "its tokenizer_config.json."
                )

    def trainer(self, loaded: Loaded, data: Data, bar: ProgressBar) -> tuple[AdapterTrainer, list[str]]:
        from transformers import DataCollatorForSeq2Seq

        from rankwise.train.trainer.text_to_text import TextToTextTrainer, scorer, text_to_text_config, tokenised

        recipe, tokenizer = loaded.recipe, loaded.tokenizer
        train = tokenised(data.train, tokenizer, recipe.max_length)
        held_out = None if data.eval is None else tokenised(data.eval, tokenizer, recipe.max_length)
        for what, prepared in (("training", train), ("held-out", held_out)):
            if prepared is not None:
                preflight.check_fits(preflight.numbered(prepared), what, loaded.model, tokenizer)
                preflight.check_fits(preflight.numbered(prepared, "labels"), what, loaded.model, tokenizer)
        trainer = TextToTextTrainer(
            model=loaded.model,
            args=text_to_text_config(recipe, has_eval=held_out is not None),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, loaded.model),
            compute_metrics=scorer(recipe.answer_metrics, tokenizer) if recipe.answer_metrics else None,
            callbacks=[bar],
            recipe=recipe,
        )
        return trainer, []

    def summary(self, loaded: Loaded, data: Data, trainer: AdapterTrainer, batches: Sequence[Batch]) -> DataSummary:
        tokenizer, longest, train = loaded.tokenizer, loaded.recipe.max_length, trainer.train_dataset
        facts = preflight.data_facts(train, preflight.end_tokens(loaded.model, tokenizer), longest)
        warnings = preflight.check_ends(
            facts, batches, preflight.end_tokens(loaded.model, tokenizer), tokenizer, answers=True
        )
        prompts = [len(ids) for ids in train["input_ids"]]
        cut = 0 if longest is None else sum(length >= longest for length in prompts)
        shown = {
            "samples": f"{facts.samples:,}",
            "tokens": f"{sum(prompts):,} read, {facts.tokens:,} trained",
            "longest": f"{max(prompts)} tokens of a prompt, {facts.longest} of an answer",
            "as long as max_length": f"{cut} prompts, {facts.full} answers" if longest is not None else "no limit",
        }
        if data.unread:
            shown["fields not used"] = ", ".join(data.unread)
        rows = train.select(range(min(3, len(train))))
        pieces = [
            [(str(tokenizer.decode(row["input_ids"])), False), (f" → {tokenizer.decode(row['labels'])}", True)]
            for row in rows
        ]
        return DataSummary(shown, pieces, warnings)

    def sample(self, loaded: Loaded, held_out: Dataset | None) -> Sample | None:
        return answered(loaded, held_out)

    def metrics(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        return score_changes(history)

    def figures(self, metrics: dict[str, Any]) -> Figures:
        return score_figures(metrics)

    def save(self, loaded: Loaded, adapter: Path) -> None:
        pass
