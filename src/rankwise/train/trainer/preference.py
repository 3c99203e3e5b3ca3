"""TRL's trainers on preferences, whose reference is the base itself: exact whatever the start, and no copy."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from rankwise.adapted.adapted import switched_off
from rankwise.train.data.dataset import Batch
from rankwise.train.recipe import Recipe, TrainingFields
from rankwise.train.task_fields import OPTIONS, PREFERENCE_LOSSES, losses
from rankwise.train.trainer.trainer import AdapterTrainer, arguments, refusals


class BaseReference(nn.Module):
    """The pretrained model, as a reference for TRL: the policy with its adapter switched off.

    It is the pretrained model bit for bit, also where the adapter's start is not zero. (With PEFT's PiSSA or LoRA-GA a
    switched-off adapter leaves W₀ − s B₀A₀.) Before there is an adapter it is the policy, which is the base then.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.config = policy.config
        self._policy = (policy,)  # no child, so that its weights are not moved, wrapped or saved a second time

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Past forward, on which TRL puts the head that the policy's own has already.
        (policy,) = self._policy
        with switched_off(policy):
            return policy(*args, **kwargs)


class PreferenceTrainer(AdapterTrainer):
    """What the three share: data that is tokenised already, and a loss that TRL computes."""

    _metrics: dict[str, defaultdict[str, list[float]]]
    _total_train_tokens: int

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def batch_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """TRL's loss. What it logs of it belongs to no step of the run."""
        logged = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        try:
            loss: Tensor = self.compute_loss(model, dict(batch))
        finally:
            self._metrics, self._total_train_tokens = logged
        return loss


class PairTrainer(PreferenceTrainer, DPOTrainer):  # type: ignore[misc]
    """Trains on pairs of answers: DPO and its kin."""

    refers_to_base = True

    def __init__(self, *, model: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(model=model, ref_model=BaseReference(model), **kwargs)


class UnpairedTrainer(PreferenceTrainer, KTOTrainer):  # type: ignore[misc]
    """Trains on single answers that are desirable or not: KTO."""

    refers_to_base = True

    def __init__(self, *, model: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(model=model, ref_model=BaseReference(model), **kwargs)


class RewardModelTrainer(PreferenceTrainer, RewardTrainer):  # type: ignore[misc]
    """Trains a model that gives an answer a number."""


def pair_config(recipe: Recipe, *, has_eval: bool) -> DPOConfig:
    """Recipe fields as TRL's configuration."""
    names = [PREFERENCE_LOSSES[name].trl for name in losses(recipe.loss)]
    with refusals():
        return DPOConfig(**_fields(recipe, "pairs", has_eval), loss_type=names)


def unpaired_config(recipe: Recipe, *, has_eval: bool) -> KTOConfig:
    """Recipe fields as TRL's configuration."""
    (name,) = losses(recipe.loss)
    with refusals():
        return KTOConfig(**_fields(recipe, "unpaired", has_eval), loss_type=PREFERENCE_LOSSES[name].trl)


def reward_config(recipe: Recipe, *, has_eval: bool) -> RewardConfig:
    """Recipe fields as TRL's configuration."""
    with refusals():
        return RewardConfig(**_fields(recipe, "reward", has_eval))


def _fields(recipe: Recipe, kind: str, has_eval: bool) -> dict[str, Any]:
    options = {name: getattr(recipe, name) for name in OPTIONS[kind]}
    return {
        **arguments(recipe.section(TrainingFields), recipe.seed, has_eval),
        **{name: value for name, value in options.items() if value is not None},
        "max_length": recipe.max_length,
    }
