"""A sweep's outcomes → the panels of its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rankwise.report.drawing import legend_below, looks, plain, svg
from rankwise.report.figures import Panel, Table
from rankwise.report.history import points

if TYPE_CHECKING:
    from rankwise.sweep.outcome import Outcome


def panels(outcomes: Sequence[Outcome], best: Outcome, unit: str) -> list[Panel]:
    """The table, the curves, and the losses against the rates where these differ."""
    drawn = [results(outcomes, best), curves(outcomes, unit)]
    rates = {outcome.rate for outcome in outcomes if outcome.rate is not None}
    return [*drawn, losses_by_rate(outcomes, best, unit)] if len(rates) > 1 else drawn


def results(outcomes: Sequence[Outcome], best: Outcome) -> Panel:
    """A line an arm, the best first."""
    ranked = sorted(outcomes, key=lambda outcome: (outcome.stopped is not None, -outcome.steps, outcome.validation))
    rows = [
        [
            outcome.arm.name + (" (best)" if outcome is best else ""),
            "–" if outcome.rate is None else f"{outcome.rate:.3g}",
            "–" if outcome.parameters is None else f"{outcome.parameters:,}",
            str(outcome.steps),
            f"{outcome.validation:.4f}" if math.isfinite(outcome.validation) else "diverged",
            "to its end" if outcome.stopped is None else outcome.stopped.reason,
        ]
        for outcome in ranked
    ]
    reading = (
        f"Lower is better. Best on the validation samples: {best.arm.name}. An arm that was stopped early has the loss "
        "of the step at which it was."
    )
    table = Table(["arm", "learning rate", "parameters", "steps", "validation", "trained"], rows)
    return Panel("Every arm", reading, table=table)


def curves(outcomes: Sequence[Outcome], unit: str) -> Panel:
    """Training and validation loss against steps."""

    def draw(figure: Figure) -> None:
        training, validation = figure.subplots(1, 2)
        for outcome, (colour, style, mark) in zip(outcomes, looks(), strict=False):
            training.plot(*points(outcome.history, "loss"), style, color=colour, linewidth=1.4)
            line, name = points(outcome.history, "eval_loss"), plain(outcome.arm.name)
            validation.plot(*line, style, color=colour, marker=mark, markersize=4, linewidth=1.6, label=name)
        for axes, what in ((training, "training"), (validation, "validation")):
            axes.set(xlabel="optimizer step", ylabel=f"{what} loss ({unit})")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(linewidth=0.6)
        legend_below(figure, validation)

    size = (9, 3.6 + 0.22 * math.ceil(len(outcomes) / 3))
    reading = "A line that ends early is of an arm that was stopped. Training loss is of the batches just trained on."
    return Panel("Loss along the run", reading, svg("sweep-curves", "Loss against optimizer step", size, draw))


def losses_by_rate(outcomes: Sequence[Outcome], best: Outcome, unit: str) -> Panel:
    """The last validation loss against the learning rate, a line for arms that differ in nothing else."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        others = {field: value for field, value in outcome.arm.changes.items() if field != "learning_rate"}
        if math.isfinite(outcome.validation) and outcome.rate is not None:
            name = ", ".join(f"{field} {value}" for field, value in others.items())
            lines.setdefault(name, []).append((outcome.rate, outcome.validation))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (name, line), (colour, style, mark) in zip(lines.items(), looks(), strict=False):
            rates, losses = zip(*sorted(line), strict=True)
            axes.plot(rates, losses, style, color=colour, marker=mark, markersize=5, label=plain(name) or "all arms")
        axes.plot([best.rate or math.nan], [best.validation], "o", markersize=12, fillstyle="none", label="best")
        axes.set_xscale("log")
        axes.set(xlabel="peak learning rate", ylabel=f"validation loss ({unit})")
        axes.grid(linewidth=0.6)
        legend_below(figure, axes)

    reading = (
        "The last loss of each arm; of one that was stopped early, the loss at which it was. The ring is the best."
    )
    size = (8, 3.6 + 0.22 * math.ceil(len(lines) / 3))
    return Panel("Loss by learning rate", reading, svg("sweep-rates", "Loss against learning rate", size, draw))
