"""transformers' and TRL's trainers, taught that the model carries a rankwise adapter: checkpoints hold it only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import rankwise as rw
from rankwise.checkpoint import load_state, save_state
from rankwise.errors import CheckpointError, RecipeError, TrainingError
from rankwise.slots import find_record

# What `Trainer` writes beside the weights. A resume without one of them goes on from another state than
# the one that was saved, so each is asked for before anything is loaded.
_RESUME_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state*.pth")


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Overrides where a `Trainer` saves, loads and steps, and nothing else.

    A checkpoint directory is a PEFT adapter (`rw.save`) plus the raw trained tensors and their anchor, from
    which the run goes on bit for bit.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *, model: PreTrainedModel, lr_ratio: float | str | None = None, **kwargs: Any) -> None:
        self.lr_ratio = lr_ratio
        self._own_forward = vars(model).get("forward")
        with _announced(model), _refusals():
            super().__init__(model=model, **kwargs)
        self.remove_callback(PrinterCallback)

    def release(self) -> None:
        """Give the model its own forward back: TRL and accelerate put theirs on the instance."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.__dict__.pop("forward", None)
        if self._own_forward is not None:
            self.model.forward = self._own_forward

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """LoRA+ asks for its own groups; otherwise transformers' are right."""
        if self.optimizer is None and self.lr_ratio is not None:
            args = self.args
            groups = rw.param_groups(
                self.model if model is None else model,
                lr=args.learning_rate,
                lr_ratio=self.lr_ratio,
                weight_decay=args.weight_decay,
            )
            cls, options = self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = cls(groups, **options)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; a loss that is not finite stops the run before it reaches the weights."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"step {self.state.global_step + 1}: expected a finite loss, found {loss.item()}. The adapter was not "
                f"updated with it; earlier checkpoints in {self.args.output_dir} are good. Lower learning_rate (now "
                f"{self.args.learning_rate:g}), add warmup_steps, or train with bf16: false."
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Before the first step it is the pretrained model that is evaluated, also where the start changes it."""
        before_training = self.state.global_step == 0 and find_record(self.model) is not None
        with rw.disabled(self.model) if before_training else nullcontext():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        rw.save(self.model, directory)
        save_state(self.model, directory)
        self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        missing = [name for name in _RESUME_FILES if not any(directory.glob(name))]
        if missing:
            raise CheckpointError(
                f"{directory}: cannot resume exactly, {', '.join(missing)} not found there. Resume from another "
                "checkpoint, or start anew from its adapter."
            )
        _check_unfinished(directory, self.args.max_steps)
        load_state(self.model if model is None else model, directory)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run writes its own card once its results are known."""


@contextmanager
def _announced(model: PreTrainedModel) -> Iterator[None]:
    """A `Trainer` refuses a quantised model without adapters; ours come after it, as their start needs its batches."""
    before = vars(model).get("_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    if getattr(model, "is_quantized", False):
        model.requires_grad_(False)  # TRL would round what is trainable, embeddings and norms too, to bf16
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def _check_unfinished(directory: Path, max_steps: int) -> None:
    done = json.loads((directory / "trainer_state.json").read_text())["global_step"]
    if 0 < max_steps <= done:
        raise CheckpointError(
            f"{directory}: holds step {done} of a run to step {max_steps}, so nothing is left to train; raise "
            f"max_steps, or take the adapter in it"
        )


class LanguageTrainer(AdapterTrainer, SFTTrainer):  # type: ignore[misc]
    """Trains a language model as TRL does."""

    def _send_telemetry(self) -> None:
        """Nothing: a run tells nobody."""


class ClassifierTrainer(AdapterTrainer):
    """Trains a classifier."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Their forward takes any argument, but not the number of items that accumulated batches hold together.
        self.model_accepts_loss_kwargs = False


def newest_checkpoint(output_dir: str | Path) -> str:
    """The checkpoint directory with the highest step, for `resume_from_checkpoint: true`."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    if not found:
        raise CheckpointError(
            f"{output_dir}: expected a checkpoint-N directory to resume from, found none. "
            "Drop resume_from_checkpoint to start anew, or name the directory."
        )
    return str(max(found, key=lambda path: int(path.name.removeprefix("checkpoint-"))))


# Fields that the trainer takes elsewhere or under another name.
_OURS = ("resume_from_checkpoint", "gradient_checkpointing")


def sft_config(training: dict[str, Any], *, max_length: int | None, seed: int, has_eval: bool) -> SFTConfig:
    """Recipe fields as TRL's configuration."""
    with _refusals():
        return SFTConfig(**_arguments(training, seed, has_eval), max_length=max_length)


def training_arguments(training: dict[str, Any], *, seed: int, has_eval: bool) -> TrainingArguments:
    """Recipe fields as transformers' configuration."""
    # Not "group_by_length": its order comes from the global random state, so that a resumed run would see another.
    with _refusals():
        return TrainingArguments(**_arguments(training, seed, has_eval))


@contextmanager
def _refusals() -> Iterator[None]:
    """transformers' own checks of the training fields, as errors in the recipe."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise RecipeError(f"training fields: transformers refuses them: {error}") from None


def _arguments(training: dict[str, Any], seed: int, has_eval: bool) -> dict[str, Any]:
    """Recipe fields under transformers' names; the additions below are what the fields imply."""
    given = {name: value for name, value in training.items() if name not in _OURS}
    evaluate = "no" if not has_eval else "epoch" if given["eval_steps"] is None else "steps"
    return {
        **given,
        # transformers' new name for what everyone still calls gradient checkpointing.
        "activation_checkpointing": training["gradient_checkpointing"],
        "seed": seed,
        "eval_strategy": evaluate,
        # The start changes nothing, so an evaluation before the first step is the pretrained model's.
        "eval_on_start": has_eval and not training["resume_from_checkpoint"],
        # transformers would report a NaN as the average of the losses before it.
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
