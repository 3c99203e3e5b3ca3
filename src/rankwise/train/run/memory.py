"""How much memory a run will take, from the model's configuration alone: no weight is loaded.

One training step and one evaluation run on fake tensors, which have a shape and a storage but no content; what they
hold is added up as it comes and goes, so that the peak is where the real step has it. It is an estimate from below:
what a CPU's allocator keeps to itself, and what is computed around the step, come on top (benchmarks/memory.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, PreTrainedModel

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.layers.low_rank_product import add_low_rank
from rankwise.train.model.pretrained import TASKS
from rankwise.train.model.skeleton import locate_files
from rankwise.train.recipe import Recipe
from rankwise.train.tasks.base import spec_of

# Bytes of a weight in a quantised linear layer, with the scales of its blocks of 64 (nf4) or of its rows (int8).
_QUANTISED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
_STATES = 2  # AdamW's moments; no optimizer here keeps more


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        base: the frozen weights.
        adapter: the trained numbers, and the frozen copy of a start that is not zero.
        optimizer: gradients and moments of what is trained.
        step: the most that a training step holds beside these: activations, logits, and their gradients.
        evaluation: the same of an evaluation, which holds no gradients.
    """

    base: int
    adapter: int
    optimizer: int
    step: int
    evaluation: int

    @property
    def peak(self) -> int:
        """The most at one time; what the process itself takes (Python, torch's kernels) comes on top."""
        return self.base + self.adapter + self.optimizer + max(self.step, self.evaluation)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that come after it, as long as they live, and keeps the largest sum."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._came, outputs)
        return outputs

    def _came(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._went, key, storage.nbytes())

    def _went(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def plan_memory(recipe: Recipe) -> Memory:
    """What a recipe's run will hold, with every sample as long as ``max_length``.

    Raises:
        RecipeError: there is no ``max_length``, or another task. PretrainedError, TargetError: as a run's own.
    """
    if recipe.task not in ("causal-lm", "classification"):
        raise RecipeError(
            f"`task`: the memory of a run is planned for causal-lm and classification; found {recipe.task}, of which a "
            "step is another. `rankwise check` tries one step and measures it"
        )
    if recipe.max_length is None:
        raise RecipeError("`max_length`: expected a number, as memory grows with the longest sample; found null")
    config = AutoConfig.from_pretrained(locate_files(recipe.model), local_files_only=True, trust_remote_code=False)
    dtype = config.dtype or torch.float32 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    with FakeTensorMode():
        model: PreTrainedModel = TASKS[recipe.task].from_config(config, dtype=dtype)
        spec = spec_of(recipe)
        sites = rw.plan(model, spec)
        base = _base_bytes(model, sites, recipe.quantization)
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable()
        model.requires_grad_(False).train()
        anchored = not spec.has_default_init
        with _adapted(model, sites, 2 if anchored else 1) as pairs:
            step = _step_bytes(model, pairs, recipe, recipe.per_device_train_batch_size)
            evaluation = 0
            if recipe.eval_data is not None or recipe.eval_split is not None:
                with torch.no_grad():
                    evaluation = _step_bytes(model.eval(), pairs, recipe, recipe.per_device_eval_batch_size)
    number = torch.finfo(dtype).bits // 8
    return Memory(
        base=base,
        adapter=sites.parameters * number * (2 if anchored else 1),
        optimizer=sites.parameters * number * (1 + _STATES),
        step=step,
        evaluation=evaluation,
    )


def _base_bytes(model: nn.Module, sites: Sequence[rw.Site], quantization: str) -> int:
    whole = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in model.parameters()}.values())
    if quantization == "none":
        return whole
    weights = [model.get_parameter(f"{site.name}.weight") for site in sites if site.kind == "linear"]
    return whole - sum(w.nbytes for w in weights) + round(sum(w.numel() for w in weights) * _QUANTISED[quantization])


@contextmanager
def _adapted(model: nn.Module, sites: Sequence[rw.Site], pairs: int) -> Iterator[list[Tensor]]:
    """Add a low-rank pair's part to the output of every site, as an adapter's slot does. Gives the pairs."""
    hooks, tensors = [], []
    for site in sites:
        layer = model.get_submodule(site.name)
        dtype = next(layer.parameters()).dtype
        A = torch.zeros(pairs * site.rank, site.shape[1], dtype=dtype, requires_grad=True)
        B = torch.zeros(site.shape[0], pairs * site.rank, dtype=dtype, requires_grad=True)
        tensors += [A, B]
        hooks.append(layer.register_forward_hook(partial(_add, A, B)))
    try:
        yield tensors
    finally:
        for hook in hooks:
            hook.remove()


def _add(A: Tensor, B: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = inputs[0]
    return add_low_rank(output, x, A, B, 1.0) if x.is_floating_point() and x.shape[-1] == A.shape[1] else output


def _step_bytes(model: PreTrainedModel, pairs: Sequence[Tensor], recipe: Recipe, samples: int) -> int:
    """The most that a forward holds, and a backward where gradients are wanted."""
    ids = torch.zeros(samples, recipe.max_length or 1, dtype=torch.long)
    labels = ids if recipe.task == "causal-lm" else ids[:, 0]
    with LiveBytes([*model.parameters(), *model.buffers(), *pairs]) as live:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        if loss.requires_grad:
            loss.backward()
    return int(live.peak)


def memory_table(memory: Memory) -> Table:
    """For the terminal."""
    table = Table(
        title="Memory, estimated from below", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    rows = {
        "base weights": memory.base,
        "adapter": memory.adapter,
        "gradients and moments": memory.optimizer,
        "a training step": memory.step,
        "an evaluation": memory.evaluation,
        "in all, beside the process's own": memory.peak,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / 2**30:.2f} GiB")
    return table
