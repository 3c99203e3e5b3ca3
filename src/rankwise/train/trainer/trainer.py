"""transformers' and TRL's trainers, taught that the model carries a rankwise adapter.

Checkpoints hold the adapter only and are there whole or not at all; what stops a run is named with its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.disk import writing
from rankwise.errors import CheckpointError, Diverged, OutOfMemory, RecipeError
from rankwise.format.state import STATE, load_state, save_state
from rankwise.optim.choice import GroupsChoice
from rankwise.optim.lora_plus import AdamWChoice
from rankwise.reshaping import shape_like
from rankwise.tensor_files import read_tensors
from rankwise.train.data.dataset import Batch
from rankwise.train.data.scores import scores
from rankwise.train.data.tokens import IGNORED, ROW
from rankwise.train.model.generation import generate
from rankwise.train.recipe import Recipe
from rankwise.train.trainer import checkpoints, exact_resume
from rankwise.train.trainer.contents import loading, steps_done
from rankwise.train.trainer.optimizer_choice import optimizer_of
from rankwise.train.trainer.reshaping_callback import ReshapingCallback
from rankwise.train.trainer.run_log import Throughput
from rankwise.train.trainer.variant_callback import VariantCallback

RESULTS = "metrics.json"  # of a run that is through: the last file that it writes
_SHOWN_SAMPLES = 32

# (batch, what computes its loss and gradients) → the loss.
Computing = Callable[[Any, Callable[[], Tensor]], Tensor]


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Overrides where a `Trainer` saves, loads and steps, and nothing else.

    A checkpoint directory is a PEFT adapter (`rw.save`), the raw trained tensors and their anchor, from which the run
    goes on bit for bit, and what transformers writes of its own: `optimizer.pt`, `scheduler.pt`, `rng_state*.pth`
    (pickles, read by transformers with `weights_only`, so that they can run no code) and `trainer_state.json`.

    Attributes:
        computing: around the forward and backward pass of each batch; a sweep's runs wait there for each other.
    """

    refers_to_base: ClassVar[bool] = False  # whether the loss compares the model with its base
    optimizer: torch.optim.Optimizer | None
    computing: Computing

    def __init__(self, *, model: PreTrainedModel, recipe: Recipe, **kwargs: Any) -> None:
        self.recipe = recipe
        self._optimizer_choice = optimizer_of(recipe)
        self._own_forward = vars(model).get("forward")
        self._base = exact_resume.base_digest(model)  # now, that no adapter changes it
        self._saving_in: str | None = None
        self._at = (0, -1)  # the optimizer step and the batch within it that are being computed
        self._batch_shape: tuple[int, ...] = ()
        self.computing = _alone
        # transformers makes the directory at once.
        with _announced(model), refusals(), writing(Path(recipe.output_dir)):
            super().__init__(model=model, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RecipeError(
                "a recipe trains on one device, or on several that hold the whole base each; found FSDP or DeepSpeed "
                "in accelerate's configuration. Launch with torchrun, or train with examples/launch/fsdp2.py or "
                "examples/launch/trainer.py, which shard the base (docs/scaling.md)"
            )
        self.remove_callback(PrinterCallback)
        self.add_callback(VariantCallback())
        self._throughput = Throughput()
        self.add_callback(self._throughput)
        if recipe.reshapes:
            self.add_callback(ReshapingCallback(self))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides whether a resume is exact."""
        args = self.args
        return exact_resume.facts(
            self.recipe, self.train_dataset, self._base, processes=args.world_size, device=args.device.type
        )

    @cached_property
    def run_steps(self) -> int:
        """The optimizer steps of the whole run."""
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return int(steps)

    def release(self) -> None:
        """Give the model its own forward back: TRL and accelerate put theirs on the instance."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model.__dict__.pop("forward", None)
        if self._own_forward is not None:
            self.model.forward = self._own_forward

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer; parameter groups are stepped by what `optim` names."""
        if self.optimizer is None:
            self.optimizer = self._chosen_optimizer(self.model if model is None else model)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def optimizer_at(self, rate: float) -> torch.optim.Optimizer:
        """A new optimizer like the run's own, at another rate. The run's is not touched."""
        run = self.optimizer, self.args.learning_rate
        self.optimizer, self.args.learning_rate = None, rate
        try:
            return self.create_optimizer()
        finally:
            self.optimizer, self.args.learning_rate = run

    def take_recipe(self, recipe: Recipe) -> None:
        """Train as this recipe says, which differs from the one before in a rate that is chosen now."""
        self.recipe, self.args.learning_rate = recipe, recipe.peak_learning_rate

    def batch_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the run minimises, on one batch: what a start, a probe or an analysis takes gradients of."""
        loss: Tensor = model(**batch).loss
        return loss

    def as_batch(self, drawn: Any) -> Batch:
        """What the training data's loader gives, as :meth:`batch_loss` takes it."""
        batch: Batch = drawn
        return batch

    def enable_activation_checkpointing(self) -> None:
        """As training does by itself, for what runs the model before it."""
        options = dict(self.args.activation_checkpointing_kwargs or {})
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)

    def _chosen_optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """None for AdamW, whose groups transformers makes itself."""
        args, choice = self.args, self._optimizer_choice
        if isinstance(choice, AdamWChoice):
            return None
        if isinstance(choice, GroupsChoice):
            cls, options = self.get_optimizer_cls_and_kwargs(args, model)
            groups = choice.groups(model, args.learning_rate, args.weight_decay)
            optimizer: torch.optim.Optimizer = cls(groups, **options)
            return optimizer
        return choice(model, args.learning_rate, args.weight_decay)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; memory that runs out is named with the step."""
        try:
            return super().train(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(self._out_of_memory(error)) from error

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Where to begin; how often to save, log and evaluate is the recipe's to say, not the checkpoint's."""
        with loading(Path(self.args.output_dir)):
            begin = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return begin

    def _run_epoch(self, **kwargs: Any) -> None:
        """An epoch; none where the checkpoint that is resumed from was the run's last."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One step; a loss that is not finite stops the run before it reaches the weights."""
        step, batch = self._at
        self._at = (self.state.global_step, batch + 1 if step == self.state.global_step else 0)
        self._note(inputs)
        own_step = super().training_step
        loss = self.computing(inputs, lambda: own_step(model, inputs, *args, **kwargs))
        if not torch.isfinite(loss):
            raise Diverged(self._not_finite("loss", loss, self._samples(self._at[1])))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers does, with the speed and the memory beside a training loss."""
        super().log(logs | (self._throughput.take() if "loss" in logs else {}), *args, **kwargs)

    def _note(self, inputs: Any) -> None:
        """What a step is given: its size, in case memory runs out, and its tokens."""
        self._batch_shape = tuple(inputs["input_ids"].shape)
        self._throughput.saw(inputs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients; one that is not finite stops the run before they reach the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not torch.isfinite(torch.as_tensor(norm)):
            samples = [number for batch in range(self._at[1] + 1) for number in self._samples(batch)]
            raise Diverged(self._not_finite("gradient norm", norm, samples))
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Before the first step it is the pretrained model that is evaluated, also where the start changes it.

        It leaves the run's random numbers as they were, so that a run takes the same steps however often it is
        evaluated, and resumes exactly from a checkpoint that was written before an evaluation.
        """
        before_training = self.state.global_step == 0 and Adapted.find(self.model) is not None
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with rw.disabled(self.model) if before_training else nullcontext(), torch.random.fork_rng(devices):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes `checkpoint-N`: beside the run's checkpoints, until it is whole."""
        return self._saving_in or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint or none, then fewer old ones if the recipe says so."""
        self._check_weights()
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        partial = run_dir / checkpoints.PARTIAL / checkpoints.name_of(step)
        try:
            if self.args.should_save:
                checkpoints.begin(run_dir, step)
            self.accelerator.wait_for_everyone()
            self._saving_in = str(partial.parent)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.publish(partial, self.facts)
                if self.recipe.save_total_limit is not None:
                    checkpoints.keep_newest(run_dir, self.recipe.save_total_limit)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            if not _is_of_the_disk(error):
                raise
            raise CheckpointError(
                f"{run_dir}: checkpoint-{step} could not be written ({error}). {self._last_good()} Make room on the "
                "disk, or see to its rights, and resume."
            ) from error
        finally:
            self._saving_in = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        rw.save(self.model, directory)
        save_state(self.model, directory)
        self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        _check_unfinished(directory, self.args.max_steps, Path(self.args.output_dir) / RESULTS)
        trained = self.model if model is None else model
        if self.recipe.reshapes:
            shape_like(trained, read_tensors(directory / STATE))
        load_state(trained, directory, allow_other_spec=self.recipe.resume_anyway)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(Path(checkpoint or "") / "optimizer.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(Path(checkpoint or "") / "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _check_weights(self) -> None:
        """An update can overflow where loss and gradient were finite; such weights must not become a checkpoint."""
        if all(bool(torch.isfinite(tensor).all()) for tensor in rw.trainable_parameters(self.model)):
            return
        raise Diverged(
            f"step {self.state.global_step}: expected finite adapter weights, found NaN or infinity. "
            f"{self._last_good()} {self._calmer()}"
        )

    def _samples(self, batch: int) -> list[int]:
        """Which training samples, counted from 1, are in a batch of the current step."""
        (rows,) = islice(self._rows_to_come(), batch, batch + 1)
        numbers = self.train_dataset[ROW] if ROW in self.train_dataset.column_names else None
        return [row + 1 if numbers is None else numbers[row] for row in rows]

    def batches_to_come(self, number: int) -> list[Batch]:
        """The batches that training will take next, on the model's device."""
        loader = self.get_train_dataloader()  # not gone over, as that would draw random numbers of the run
        rows = islice(self._rows_to_come(), number)
        return [self._prepare_inputs(loader.collate_fn([loader.dataset[row] for row in batch])) for batch in rows]

    def _rows_to_come(self) -> Iterator[list[int]]:
        """The samples' numbers of each batch from the current step on: the order is drawn again."""
        loader = self.get_train_dataloader()
        accumulated = self.args.gradient_accumulation_steps
        steps_in_epoch = max(1, -(-len(loader) // accumulated))
        epoch, step = divmod(self.state.global_step, steps_in_epoch)
        for number in count(epoch):
            loader.set_epoch(number)
            yield from islice(loader.batch_sampler, step * accumulated if number == epoch else 0, None)

    def _not_finite(self, what: str, value: Any, samples: list[int]) -> str:
        shown = ", ".join(map(str, sorted(samples)[:_SHOWN_SAMPLES]))
        more = "" if len(samples) <= _SHOWN_SAMPLES else f" and {len(samples) - _SHOWN_SAMPLES} more"
        return (
            f"step {self.state.global_step + 1}: expected a finite {what}, found {float(value)}, on the training "
            f"samples {shown}{more} (counted from 1). The adapter was not updated with it. {self._last_good()} "
            f"{self._calmer()}"
        )

    def _calmer(self) -> str:
        return (
            f"Look at those samples, lower learning_rate (now {self.args.learning_rate:g}), add warmup_steps, or train "
            "with bf16: false."
        )

    def _out_of_memory(self, error: BaseException) -> str:
        samples, length = (*self._batch_shape, 0, 0)[:2]
        wanted = {
            "lower per_device_train_batch_size and raise gradient_accumulation_steps": samples > 1,
            "set gradient_checkpointing: true": not self.recipe.gradient_checkpointing,
            f"lower max_length (now {self.recipe.max_length})": True,
        }
        return (
            f"step {self.state.global_step + 1}: out of memory on {self.args.device} with a batch of {samples} samples "
            f"of {length} tokens ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            f"{self._last_good()} To fit: {'; '.join(advice for advice, helps in wanted.items() if helps)}."
        )

    def _last_good(self) -> str:
        """The checkpoint to go back to, in words."""
        checkpoint, _ = checkpoints.newest_valid(self.args.output_dir)
        return "There is no checkpoint yet." if checkpoint is None else f"The last good checkpoint is {checkpoint}."

    def _send_telemetry(self) -> None:
        """Nothing: a run tells nobody."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run writes its own card once its results are known."""


def _alone(_: Any, compute: Callable[[], Tensor]) -> Tensor:
    return compute()


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


def _check_unfinished(directory: Path, max_steps: int, results: Path) -> None:
    """Refuse a run that is through. One that was killed after its last step, before its results, is not."""
    state, done = directory / "trainer_state.json", steps_done(directory)
    has_results = results.exists() and results.stat().st_mtime_ns >= state.stat().st_mtime_ns  # and not older ones
    if 0 < max_steps < done or (done == max_steps and has_results):
        raise CheckpointError(
            f"{directory}: holds step {done} of a run to step {max_steps}, so nothing is left to train; raise "
            f"max_steps and set resume_anyway: true, or take the adapter in it"
        )


class LanguageTrainer(AdapterTrainer, SFTTrainer):  # type: ignore[misc]
    """Trains a language model as TRL does, and scores its answers where the recipe says so."""

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """An evaluation; its samples have to be answered one by one."""
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.recipe.answer_metrics:
            found = scores(self.recipe.answer_metrics, *self._answers(dataloader.dataset))
            output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in found.items()})
        return output

    def _answers(self, samples: Any) -> tuple[list[str], list[str]]:
        """What the model writes after each sample's prompt, and what the sample has there."""
        answers, references, tokenizer = [], [], self.processing_class
        for row in samples:
            learnt = [index for index, label in enumerate(row["labels"]) if label != IGNORED]
            answers.append(generate(self.model, tokenizer, row["input_ids"][: learnt[0]], self.recipe.answer_tokens))
            words = [row["labels"][index] for index in learnt]
            references.append(str(tokenizer.decode(words, skip_special_tokens=True)).strip())
        return answers, references


class ClassifierTrainer(AdapterTrainer):
    """Trains a classifier."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Their forward takes any argument, but not the number of items that accumulated batches hold together.
        self.model_accepts_loss_kwargs = False


def _is_of_the_disk(error: Exception) -> bool:
    """Python says it with OSError, torch's writer with RuntimeError, tokenizers with Exception itself."""
    said_otherwise = type(error) in (RuntimeError, Exception) and not _is_out_of_memory(error)
    return isinstance(error, OSError) or said_otherwise


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an error of its own; the CPU's allocator says it in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


# Fields that the trainer takes elsewhere or under another name.
_OURS = (
    *("resume_from_checkpoint", "resume_anyway", "gradient_checkpointing", "save_total_limit"),
    "rate_probe_steps",
)


def sft_config(training: dict[str, Any], *, max_length: int | None, seed: int, has_eval: bool) -> SFTConfig:
    """Recipe fields as TRL's configuration."""
    with refusals():
        return SFTConfig(**arguments(training, seed, has_eval), max_length=max_length)


def training_arguments(training: dict[str, Any], *, seed: int, has_eval: bool) -> TrainingArguments:
    """Recipe fields as transformers' configuration."""
    # Not "group_by_length": its order comes from the global random state, so that a resumed run would see another.
    with refusals():
        return TrainingArguments(**arguments(training, seed, has_eval))


@contextmanager
def refusals() -> Iterator[None]:
    """transformers' own checks of the training fields, as errors in the recipe."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise RecipeError(f"training fields: transformers refuses them: {error}") from None


def arguments(training: dict[str, Any], seed: int, has_eval: bool) -> dict[str, Any]:
    """Recipe fields under transformers' names; the additions below are what the fields imply."""
    given = {name: value for name, value in training.items() if name not in _OURS}
    if given["learning_rate"] == "auto":
        del given["learning_rate"]  # the trainer is told once it is chosen
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
