"""`task: grpo`: a language model answers prompts several times, and learns from which answers are the better ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rankwise.errors import DataError, RecipeError
from rankwise.inits.base import Init
from rankwise.report.history import points
from rankwise.train.data import preflight
from rankwise.train.data.chat import Conversation
from rankwise.train.data.rewards import check_reward, load_reward, on_fields
from rankwise.train.data.tokens import ROW, prompt_ids, text_for
from rankwise.train.model.generation import Sample, before_and_after
from rankwise.train.recipe import Recipe
from rankwise.train.tasks.base import DataSummary, Figures, Loaded, Task
from rankwise.train.tasks.causal_lm import load_language_model

if TYPE_CHECKING:
    from datasets import Dataset

    from rankwise.train.data.dataset import Batch, Data
    from rankwise.train.trainer.progress import ProgressBar
    from rankwise.train.trainer.trainer import AdapterTrainer


class Grpo(Task):
    """Trained by TRL's `GRPOTrainer`."""

    loss_unit = "of the policy"

    def load(self, recipe: Recipe) -> Loaded:
        if recipe.reward is None:
            raise RecipeError("`reward`: task grpo needs one: exact, number, reasoning-gym, or a Python file")
        load_reward(recipe.reward)  # what fails there need not wait for the model
        return load_language_model(recipe)

    def check(self, loaded: Loaded, data: Data) -> None:
        if data.format != "prompt":
            raise DataError(
                f"the recipe's task is grpo: expected data of the prompt form (a prompt, and what the reward asks for, "
                f"such as an answer), found the {data.format} form. Set data_format: prompt, or rename its fields."
            )
        preflight.check_reached(loaded.model, loaded.sites)
        preflight.check_tokenizer(loaded.tokenizer)
        first, init = data.train[0], loaded.spec.init
        assert isinstance(init, Init) and loaded.recipe.reward is not None
        if init.needs == "gradients" and "answer" not in json.loads(first["fields"]):
            raise RecipeError(
                "`init`: one that reads gradients needs prompts with known answers (a field answer) with task grpo, "
                "found none; expected such data, or an init such as pissa or eva"
            )
        check_reward(load_reward(loaded.recipe.reward), _text(loaded, first), first["fields"], first["place"])

    def trainer(self, loaded: Loaded, data: Data, bar: ProgressBar) -> tuple[AdapterTrainer, list[str]]:
        from rankwise.train.trainer.group import GroupTrainer, group_config

        recipe = loaded.recipe
        assert recipe.reward is not None
        train, held_out = _prepared(loaded, data.train), None
        preflight.check_fits(preflight.numbered(train, "prompt_ids"), "training", loaded.model, loaded.tokenizer)
        if data.eval is not None:
            held_out = _prepared(loaded, data.eval)
            preflight.check_fits(preflight.numbered(held_out, "prompt_ids"), "held-out", loaded.model, loaded.tokenizer)
        trainer = GroupTrainer(
            model=loaded.model,
            reward_funcs=[on_fields(load_reward(recipe.reward))],
            args=group_config(recipe, has_eval=held_out is not None),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=loaded.tokenizer,
            callbacks=[bar],
            recipe=recipe,
        )
        return trainer, []

    def summary(self, loaded: Loaded, data: Data, trainer: AdapterTrainer, batches: Sequence[Batch]) -> DataSummary:
        train = trainer.train_dataset
        shown = {
            "prompts": f"{len(train):,}",
            "longest": f"{max(map(len, train['prompt_ids']))} tokens",
            "answers to each": str(trainer.args.num_generations),
        }
        rows = train.select(range(min(3, len(train))))
        return DataSummary(shown, [[(row["prompt"], False), (row["fields"], False)] for row in rows])

    def sample(self, loaded: Loaded, held_out: Dataset | None) -> Sample | None:
        """The first held-out prompt, with the model's greedy answers and the known one."""
        if held_out is None:
            return None
        try:
            sample = before_and_after(loaded.model, loaded.tokenizer, _asked(held_out[0]))
        except DataError:  # none that leaves room: no reason to lose a run that is through
            return None
        answer = json.loads(held_out[0]["fields"]).get("answer")
        return replace(sample, reference=None if answer is None else str(answer))

    def metrics(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        for prefix, whose in (("eval_", "held-out"), ("", "training")):
            _, rewards = points(history, f"{prefix}reward")
            if rewards:
                return {"reward_before": rewards[0], "reward_after": rewards[-1], "rewards_of": whose}
        return {}

    def figures(self, metrics: dict[str, Any]) -> Figures:
        if "reward_after" not in metrics:
            return {}
        before, after = (f"{metrics[f'reward_{when}']:.3f}" for when in ("before", "after"))
        return {f"{metrics['rewards_of']} reward": (before, after)}

    def save(self, loaded: Loaded, adapter: Path) -> None:
        pass


def _prepared(loaded: Loaded, samples: Dataset) -> Dataset:
    """The prompts as texts, whose tokens are the chat template's; what the reward is given; a known answer's tokens."""

    def numbered(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        tokenizer, answer = loaded.tokenizer, json.loads(row["fields"]).get("answer")
        known = [] if answer is None else [*tokenizer(str(answer), add_special_tokens=False)["input_ids"]]
        return {
            "prompt": _text(loaded, row),
            "fields": row["fields"],
            "prompt_ids": prompt_ids(tokenizer, _asked(row))[1],
            "answer_ids": [*known, tokenizer.eos_token_id] if known else known,
            ROW: index + 1,
        }

    return samples.map(numbered, with_indices=True, remove_columns=samples.column_names, new_fingerprint=uuid4().hex)


def _asked(row: Mapping[str, Any]) -> str | Conversation:
    return str(row["prompt"]) if "prompt" in row else Conversation.of(row)


def _text(loaded: Loaded, row: Mapping[str, Any]) -> str:
    return text_for(loaded.tokenizer, _asked(row))
