"""`learning_rate: auto` of a run: the search before its first step, the choice, and its record on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from rankwise.disk import write_json
from rankwise.errors import BrokenFile, Diverged, RecipeError
from rankwise.files import read_json
from rankwise.methods import name_of
from rankwise.optim import OPTIMIZERS
from rankwise.sites import Site
from rankwise.train.learning_rate.guess import first_guess
from rankwise.train.learning_rate.probe import Probe, same_random_numbers
from rankwise.train.learning_rate.rules import Rule, product
from rankwise.train.trainer.optimizer_choice import optimizer_of
from rankwise.train.trainer.trainer import AdapterTrainer
from rankwise.train.trainer.variant_callback import training_hooks
from rankwise.tuning import Tuned, tune

T = TypeVar("T")
FILE = "learning_rate.json"
MOST_RATES = 8  # a best rate up to 32 times the guess, or a 32th of it, has neighbours on both sides
SHARE = 0.15  # of the run's steps, for all rates together ...
LEAST_STEPS, MOST_STEPS = 10, 20  # ... but for each rate no fewer, and no more
HELD_BACK = 6  # batches that a probe is judged on


@dataclass(frozen=True)
class Choice:
    """A rate that was chosen, and why.

    Attributes:
        rate: it, to two digits: where the parabola through the best of those tried and its neighbours is least.
        guess: the product of the rules, to two digits.
        reasons: the rules', with their factors.
        tried: rate and loss of the batches held back, by rate; None: it diverged.
        bracketed: whether the rates on both sides of the best were tried, and did worse.
        steps: of an optimizer, that the probes took together.
    """

    rate: float
    guess: float
    reasons: Sequence[str]
    tried: Sequence[tuple[float, float | None]]
    bracketed: bool
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"reasons": list(self.reasons), "tried": [list(pair) for pair in self.tried]}

    def __str__(self) -> str:
        losses = ", ".join(f"{rate:g}: {_shown(loss)}" for rate, loss in self.tried)
        edge = "" if self.bracketed else " The best is at the edge of them: a better one may lie beyond."
        return f"Learning rate {self.rate:g}. Tried in {self.steps} steps, with their losses: {losses}.{edge}"


def _shown(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


@dataclass(frozen=True)
class Search:
    """A choice that is still to be made: a ladder of factors of two from the guess, a probe a rung."""

    rules: Sequence[Rule]
    probe: Probe
    run_steps: int

    @property
    def guess(self) -> float:
        """The product of the rules, to two digits."""
        return float(f"{product(self.rules):.2g}")

    @property
    def reasons(self) -> list[str]:
        """Each rule's factor and reason."""
        return [f"{rule.factor:.3g}: {rule.reason}" for rule in self.rules]

    def __str__(self) -> str:
        each = len(self.probe.steps)
        most = MOST_RATES * each
        return "\n".join(
            [
                f"Learning rate: auto. From rules {self.guess:g}, the product of",
                *(f"  {reason}" for reason in self.reasons),
                f"then by probes of {each} steps each on the run's first batches, judged on "
                f"{len(self.probe.held_back)} training batches held back: {3 * each} to {most} optimizer steps before "
                f"the first of the run's {self.run_steps} ({most / self.run_steps:.0%} of them at most).",
            ]
        )

    def choose(self) -> Choice:
        """Probe. The model is, bit for bit, as before.

        Raises:
            Diverged: at every rate.
        """
        tuned = tune(self.probe, self.guess, most=MOST_RATES)
        if math.isinf(tuned.loss):
            raise Diverged(
                "learning_rate: auto: expected a finite loss at one rate at least, found none from "
                f"{min(tuned.tried):g} to {max(tuned.tried):g}. Look at the training data's first samples, or name a "
                "rate"
            )
        tried = [(rate, None if math.isinf(loss) else loss) for rate, loss in tuned.tried.items()]
        steps = len(tried) * len(self.probe.steps)
        return Choice(least(tuned), self.guess, self.reasons, tried, tuned.bracketed, steps)


def least(tuned: Tuned) -> float:
    """Where the parabola through the best rung's loss and its neighbours', over the rate's logarithm, is least.

    That is within half a rung of the best; it itself where a neighbour is missing, or diverged.

    >>> least(Tuned(2e-3, 1.0, {1e-3: 1.1, 2e-3: 1.0, 4e-3: 1.3}, bracketed=True))
    0.0017
    """
    rates = sorted(tuned.tried)
    place = rates.index(tuned.rate)
    around = rates[max(place - 1, 0) : place + 2]
    losses = [tuned.tried[rate] for rate in around]
    if len(around) < 3 or not all(map(math.isfinite, losses)):
        return float(f"{tuned.rate:.2g}")
    low, middle, high = losses
    bend = low - 2 * middle + high
    rungs = (low - high) / (2 * bend) if bend > 0 else 0.0
    return float(f"{tuned.rate * (around[2] / around[1]) ** rungs:.2g}")


def search(trainer: AdapterTrainer, sites: Sequence[Site]) -> Search:
    """What a trainer whose adapter is at its start needs to choose its rate. Nothing is trained yet.

    Raises:
        RecipeError: several processes, or too little data to hold a batch back.
    """
    recipe, args = trainer.recipe, trainer.args
    if args.world_size > 1:
        raise RecipeError(
            f"`learning_rate`: auto is chosen in one process, found {args.world_size}. Take the number that a run of "
            f"one process chooses (it is in {FILE} of its directory)"
        )
    run_steps = trainer.run_steps
    each = probe_length(run_steps) if recipe.rate_probe_steps is None else recipe.rate_probe_steps // MOST_RATES
    method = OPTIMIZERS[name_of(OPTIMIZERS, optimizer_of(recipe))]
    rules = first_guess(trainer.model, sites, method, trainer.optimizer_at, run_steps)
    return Search(rules, _probe(trainer, each, run_steps), run_steps)


def _probe(trainer: AdapterTrainer, steps: int, run_steps: int) -> Probe:
    """The first steps of the run itself, but for their rate."""
    args, model = trainer.args, trainer.model
    accumulated = args.gradient_accumulation_steps
    with same_random_numbers():
        batches = list(islice(trainer.get_train_dataloader(), steps * accumulated + HELD_BACK))
    if args.activation_checkpointing:
        trainer.enable_activation_checkpointing()
    hooks = training_hooks(model, run_steps)

    def before_step(number: int) -> None:
        for hook in hooks:
            hook.before_step(number)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with trainer.accelerator.autocast():
            return trainer.batch_loss(model, batch)

    parts = _parts(batches, steps, accumulated)
    return Probe(model, *parts, loss, trainer.optimizer_at, before_step, args.max_grad_norm)


def probe_length(run_steps: int) -> int:
    """Steps of each probe: so many that all of them take SHARE of the run's, within bounds.

    >>> probe_length(100), probe_length(600), probe_length(100_000)
    (10, 11, 20)
    """
    return min(max(int(SHARE * run_steps / MOST_RATES), LEAST_STEPS), MOST_STEPS)


def _parts(batches: Sequence[T], steps: int, accumulated: int) -> tuple[list[list[T]], Sequence[T]]:
    """The batches of each step, from the first again where there are too few; and those held back, from the end."""
    count = min(HELD_BACK, len(batches) // 2)
    if count == 0:
        raise RecipeError(
            "`learning_rate`: auto holds training batches back to judge a probe on: expected two batches at least, "
            f"found {len(batches)}. Lower per_device_train_batch_size, or give a number"
        )
    endless = cycle(batches[:-count])
    return [list(islice(endless, accumulated)) for _ in range(steps)], batches[-count:]


def save(choice: Choice, output_dir: str) -> None:
    """Write the record into the run's directory."""
    write_json(Path(output_dir) / FILE, choice.to_dict())


def recorded(output_dir: str, rate: float) -> Choice | None:
    """The record of how a run chose this rate; None where there is none.

    Raises:
        BrokenFile: it is no such record.
    """
    path = Path(output_dir) / FILE
    if not path.is_file():
        return None
    fields = read_json(path)
    try:
        choice = Choice(**fields | {"tried": [tuple(pair) for pair in fields["tried"]]})
    except (TypeError, KeyError) as error:
        raise BrokenFile(
            f"{path}: expected the record of how the run chose its learning rate, found: {error!r}; remove it to go on "
            "without one"
        ) from None
    return choice if choice.rate == rate else None
