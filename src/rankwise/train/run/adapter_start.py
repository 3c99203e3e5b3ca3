"""The start of a run: gradients of its first batches → adapter, and what their spectra say about ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import overload

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import rankwise as rw
from rankwise.analysis.rank_advice import RankAdvice, advise_ranks, step_spectrum
from rankwise.disk import write_file
from rankwise.errors import RecipeError
from rankwise.evidence import collect_gradients
from rankwise.inits.base import Init
from rankwise.train.data.dataset import Batch
from rankwise.train.recipe import Recipe
from rankwise.train.run.tables import ADVISED_RANKS
from rankwise.train.tasks.base import Loaded
from rankwise.train.trainer.alignment_callback import Loss
from rankwise.train.trainer.trainer import AdapterTrainer


def first_batches(trainer: AdapterTrainer, recipe: Recipe) -> list[Batch]:
    """The first batches of the run itself, on the model's device."""
    count = recipe.init_batches * recipe.gradient_accumulation_steps
    return [trainer.as_batch(drawn) for drawn in islice(iter(trainer.get_train_dataloader()), count)]


def attach(loaded: Loaded, batches: Sequence[Batch], loss: Loss, console: Console, name: str = "default") -> None:
    """Put the adapter on the model, its start computed from the batches, or read from the recipe's cache.

    Args:
        loss: (model, batch) → what is minimised.

    Raises:
        RecipeError: a cache, and an init that collects no gradients. EvidenceError and others: see ``rankwise.attach``.
    """
    recipe, init = loaded.recipe, loaded.spec.init
    assert isinstance(init, Init)
    if recipe.init_cache and init.needs != "gradients":
        raise RecipeError(
            f"`init_cache`: init {type(init).__name__} collects no gradients, so there is nothing to keep; expected an "
            f"init such as lora-ga, or no cache"
        )
    with with_bar(batches, "Computing the adapter's start", console) as watched:
        evidence = None
        if recipe.init_cache:
            evidence = collect_gradients(loaded.model, loaded.sites.evidence, watched, loss, cache=recipe.init_cache)
        rw.attach(
            loaded.model,
            loaded.spec,
            batches=watched,
            loss=loss,
            evidence=evidence,
            method=recipe.init_method,
            memory_budget=recipe.memory_budget,
            name=name,
        )


def advise(
    loaded: Loaded, batches: Sequence[Batch], loss: Loss, parameters: int | None, console: Console
) -> tuple[dict[str, list[float]], RankAdvice]:
    """From the gradients of the batches: the share of the first step at each of ``ADVISED_RANKS``, and the best ranks.

    Args:
        parameters: the budget; None: what the recipe's own ranks take.

    Returns:
        Site → its shares; and the advice.
    """
    shapes = {site.name: site.shape for site in loaded.sites}
    largest = min(max(ADVISED_RANKS), *(min(shape) // 2 for shape in shapes.values()))
    budget = sum(site.parameters for site in loaded.sites) if parameters is None else parameters
    with with_bar(batches, "Collecting gradients", console) as watched:
        evidence = rw.gradients(
            loaded.model,
            watched,
            list(shapes),
            loaded.recipe.init_method,
            rank=largest,
            memory_budget=loaded.recipe.memory_budget,
            cache=loaded.recipe.init_cache,
            loss=loss,
        )
        spectra = {name: step_spectrum(gradient, largest) for name, gradient in evidence.items()}
    return {name: spectrum.shares.tolist() for name, spectrum in spectra.items()}, advise_ranks(spectra, shapes, budget)


class _BatchesWithBar(Sequence[Batch]):
    """Batches that move a bar along in every pass over them."""

    def __init__(self, batches: Sequence[Batch], progress: Progress, doing: str) -> None:
        self._batches, self._progress, self._doing = batches, progress, doing
        self._task = progress.add_task(doing, total=None)

    def __iter__(self) -> Iterator[Batch]:
        self._progress.reset(self._task, total=len(self._batches), description=f"{self._doing}: batches")
        for batch in self._batches:
            yield batch
            self._progress.advance(self._task)
        self._progress.update(self._task, description=f"{self._doing}: directions")

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self._batches[index]


@contextmanager
def with_bar(batches: Sequence[Batch], doing: str, console: Console) -> Iterator[Sequence[Batch]]:
    """The batches, with a bar on the console while something goes over them."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield _BatchesWithBar(batches, progress, doing)


def write_rank_pattern(advice: RankAdvice, path: Path) -> None:
    """The advised ranks as a recipe's ``rank_pattern``."""
    lines = [f"  {name}: {rank}" for name, rank in advice.ranks.items()]
    write_file(path, ("\n".join(["rank_pattern:", *lines]) + "\n").encode())
