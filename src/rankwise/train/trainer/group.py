"""TRL's `GRPOTrainer`, whose reference is the base itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from rankwise.train.data.dataset import Batch
from rankwise.train.data.tokens import IGNORED
from rankwise.train.recipe import Recipe, TrainingFields
from rankwise.train.task_fields import GROUP_OPTIONS
from rankwise.train.trainer.preference import BaseReference
from rankwise.train.trainer.trainer import AdapterTrainer, arguments, refusals


class GroupTrainer(AdapterTrainer, GRPOTrainer):  # type: ignore[misc]
    """Trains on rewards of the model's own answers, in groups to the same prompt."""

    refers_to_base = True

    def __init__(self, *, model: PreTrainedModel, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(model=model, recipe=recipe, **kwargs)
        # Told of it beforehand, TRL would load a copy of the model.
        self.beta = recipe.beta or 0.0
        if self.beta:
            self.ref_model = BaseReference(model)

    def as_batch(self, drawn: Sequence[Mapping[str, Any]]) -> Batch:
        """The prompts with their known answers to be learnt, or themselves where there are none.

        The policy's own loss has no gradient before it has answered, nor where all of its answers are equally good.
        """
        rows = [(row["prompt_ids"], row["answer_ids"]) for row in drawn]
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)

        def filled(parts: Sequence[Sequence[int]], filler: int) -> Tensor:
            lists = [[*part, *[filler] * (longest - len(part))] for part in parts]
            return torch.tensor(lists, device=self.args.device)

        return {
            "input_ids": filled([prompt + answer for prompt, answer in rows], self.processing_class.pad_token_id),
            "attention_mask": filled([[1] * len(prompt + answer) for prompt, answer in rows], 0),
            "labels": filled(
                [[IGNORED] * len(prompt) + answer if answer else prompt for prompt, answer in rows], IGNORED
            ),
        }

    def _note(self, inputs: Any) -> None:
        longest = max(len(row["prompt_ids"]) for row in inputs) + self.max_completion_length
        self._batch_shape = (len(inputs), longest)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The policy's loss; in training the tokens count that were written."""
        if self.model.training:
            self._throughput.saw({"input_ids": inputs["completion_ids"], "attention_mask": inputs["completion_mask"]})
        return super().compute_loss(model, inputs, *args, **kwargs)


def group_config(recipe: Recipe, *, has_eval: bool) -> GRPOConfig:
    """Recipe fields as TRL's configuration."""
    options = {name: getattr(recipe, name) for name in GROUP_OPTIONS}
    loss = {} if recipe.loss is None else {"loss_type": recipe.loss}
    with refusals():
        return GRPOConfig(
            **arguments(recipe.section(TrainingFields), recipe.seed, has_eval),
            **{name: value for name, value in options.items() if value is not None},
            **loss,
        )
