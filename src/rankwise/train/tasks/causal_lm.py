"""`task: causal-lm`: a language model learns to continue text, to complete prompts or to answer in chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rankwise as rw
from rankwise.errors import DataError
from rankwise.train.data import preflight
from rankwise.train.data.chat import Conversation, texts_of
from rankwise.train.data.tokens import Prompt, tokenised
from rankwise.train.model.generation import Sample, before_and_after
from rankwise.train.model.pretrained import load_pretrained
from rankwise.train.recipe import Recipe, TrainingFields
from rankwise.train.tasks.base import DataSummary, Figures, Loaded, Task, score_changes, score_figures, spec_of

if TYPE_CHECKING:
    from datasets import Dataset

    from rankwise.train.data.dataset import Batch, Data
    from rankwise.train.trainer.progress import ProgressBar
    from rankwise.train.trainer.trainer import AdapterTrainer


class CausalLM(Task):
    """Trained by TRL's `SFTTrainer`."""

    loss_unit = "nats per token"

    def load(self, recipe: Recipe) -> Loaded:
        return load_language_model(recipe)

    def check(self, loaded: Loaded, data: Data) -> None:
        preflight.check_reached(loaded.model, loaded.sites)
        preflight.check_form(data, loaded.tokenizer)

    def trainer(self, loaded: Loaded, data: Data, bar: ProgressBar) -> tuple[AdapterTrainer, list[str]]:
        from rankwise.train.trainer.trainer import LanguageTrainer, sft_config

        recipe, tokenizer = loaded.recipe, loaded.tokenizer
        trainer = LanguageTrainer(
            model=loaded.model,
            args=sft_config(
                recipe.section(TrainingFields),
                max_length=recipe.max_length,
                seed=recipe.seed,
                has_eval=data.eval is not None,
            ),
            train_dataset=tokenised(data.train, tokenizer, recipe.trained_turns),
            eval_dataset=None if data.eval is None else tokenised(data.eval, tokenizer, recipe.trained_turns),
            processing_class=tokenizer,
            callbacks=[bar],
            recipe=recipe,
        )
        warnings = []
        for what, given, samples in (
            ("training", data.train, trainer.train_dataset),
            ("held-out", data.eval, trainer.eval_dataset),
        ):
            if given is not None:
                preflight.check_fits(preflight.numbered(samples), what, loaded.model, tokenizer)
                warnings += preflight.check_labels(samples, given, what, tokenizer, recipe.max_length)
        return trainer, warnings

    def summary(self, loaded: Loaded, data: Data, trainer: AdapterTrainer, batches: Sequence[Batch]) -> DataSummary:
        tokenizer, longest = loaded.tokenizer, loaded.recipe.max_length
        ends = preflight.end_tokens(loaded.model, tokenizer)
        facts = preflight.data_facts(trainer.train_dataset, ends, longest)
        warnings = preflight.check_ends(facts, batches, ends, tokenizer, answers=data.format != "text")
        shown = {
            "samples": f"{facts.samples:,}",
            "tokens": f"{facts.tokens:,}, {facts.trained / facts.tokens:.0%} of them trained",
            "longest sample": f"{facts.longest} tokens",
            "cut at max_length": f"{facts.full} samples" if longest is not None else "no limit",
            "trained end token": f"in {facts.ends} samples",
        }
        if data.unread:
            shown["fields not used"] = ", ".join(data.unread)
        return DataSummary(shown, preflight.decoded(trainer.train_dataset, tokenizer, 3), warnings)

    def sample(self, loaded: Loaded, held_out: Dataset | None) -> Sample | None:
        return answered(loaded, held_out)

    def metrics(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        return score_changes(history)

    def figures(self, metrics: dict[str, Any]) -> Figures:
        return score_figures(metrics)

    def save(self, loaded: Loaded, adapter: Path) -> None:
        pass


def load_language_model(recipe: Recipe, kind: str = "causal-lm") -> Loaded:
    """A model that writes, of a kind that `load_pretrained` has, and what the recipe adapts of it."""
    model, tokenizer = load_pretrained(recipe.model, dtype=recipe.dtype, quantization=recipe.quantization, task=kind)
    spec = spec_of(recipe)
    planned = rw.plan(model, spec, method=recipe.init_method, memory_budget=recipe.memory_budget)
    return Loaded(recipe, model, tokenizer, spec, planned)


def answered(loaded: Loaded, held_out: Dataset | None) -> Sample | None:
    """The first held-out prompt, or what a conversation's last answer answers; none of running text."""
    if held_out is None or "text" in held_out.column_names:
        return None
    prompt, reference = _asked(held_out[0])
    try:
        sample = before_and_after(loaded.model, loaded.tokenizer, prompt)
    except DataError:  # no prompt to answer, or none that leaves room: no reason to lose a run that is through
        return None
    return replace(sample, reference=reference)


def _asked(row: Mapping[str, Any]) -> tuple[Prompt, str | None]:
    """What a sample asks, and the answer that it has."""
    if "prompt" in row:
        return row["prompt"], row["completion"]
    conversation = Conversation.of(row)
    turn = conversation.turns[-1] if conversation.given is None else conversation.given
    return conversation.until(turn), "".join(texts_of(conversation.messages[turn])) or None
