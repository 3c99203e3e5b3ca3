"""A comparison's outcomes → the panels of its page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from rankwise.compare.search import Outcome
from rankwise.compare.summary import Row, Spread
from rankwise.report.drawing import legend_below, looks, plain, series, svg
from rankwise.report.figures import Panel, Table
from rankwise.report.history import points


def panels(outcomes: Sequence[Outcome], rows: Sequence[Row], unit: str) -> list[Panel]:
    """Every panel for which there is something to show."""
    shown = [outcome for outcome in outcomes if outcome.seeds]
    drawn = [seeds(shown, unit), curves(shown, unit), rates(outcomes, unit)] if shown else []
    return [results(rows), *drawn]


def results(rows: Sequence[Row]) -> Panel:
    """The table."""
    shortened = any(row.steps is not None for row in rows)
    accuracies = any(row.accuracy is not None for row in rows)
    columns: dict[str, Callable[[Row], str]] = {
        "arm": lambda row: row.arm,
        "parameters": lambda row: f"{row.parameters:,}" if row.parameters else "–",
        "best rate": _rate,
        "validation": lambda row: _spread(row.validation, "{:.4f}"),
        "test": lambda row: _spread(row.test, "{:.4f}"),
    }
    if accuracies:
        columns["accuracy"] = lambda row: _spread(row.accuracy, "{:.1%}")
    columns[f"beside {rows[0].arm}"] = lambda row: "–" if row is rows[0] else _spread(row.difference, "{:+.4f}")
    columns["gap to full closed"] = lambda row: _share(row.gap_closed)
    if shortened:
        columns |= {"steps": lambda row: _share(row.steps), "seconds": lambda row: _share(row.seconds)}
    columns["seeds"] = lambda row: str(row.seeds) + ("" if row.complete else " (incomplete)")
    table = Table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])
    return Panel("Every arm at its best rate", _reading(rows, shortened), table=table)


def _reading(rows: Sequence[Row], shortened: bool) -> str:
    first = rows[0].arm
    text = (
        "Losses as mean ± standard deviation over seeds; lower is better. Rates were chosen on the validation samples; "
        f"the test samples chose nothing. Gap closed: 0 % is the test loss of {first}, 100 % that of full fine-tuning "
        f"with AdamW. Beside {first}: the test loss less that of {first}, seed by seed; a mean within about "
        "twice its deviation over the root of the number of seeds may be the seeds' alone, and with it a gap."
    )
    if all(row.gap_closed is None for row in rows):
        text += f" Full fine-tuning with AdamW is not there, or did no better than {first}: there is no gap to close."
    if shortened:
        text += (
            f" Steps, seconds: the shortest schedule that reached the validation loss of {first}, over its own, in "
            "tenths of the steps and on the first seed."
        )
    edge = [row.arm for row in rows if row.complete and not row.bracketed]
    if edge:
        text += f" At the edge of the rates that were tried: {', '.join(edge)}."
    incomplete = [row.arm for row in rows if not row.complete]
    if incomplete:
        text += f" Incomplete, as the time was up: {', '.join(incomplete)}. The same command goes on from here."
    return text


def _rate(row: Row) -> str:
    if row.rate is None:
        return "–"
    return f"{row.rate:.3g}" + ("" if row.bracketed else " (at the edge)")


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "–"
    if not math.isfinite(spread.mean):
        return "diverged"
    return f"{form.format(spread.mean)} ± {form.format(spread.deviation).lstrip('+')}"


def _share(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.0%}"


def seeds(outcomes: Sequence[Outcome], unit: str) -> Panel:
    """Test losses, a mark a seed."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, outcome in enumerate(outcomes):
            losses = _finite([trial.test.loss for trial in outcome.seeds.values()])
            axes.plot(losses, [place] * len(losses), "o", color=series(0), alpha=0.6, markersize=6)
            if losses:
                axes.plot([fmean(losses)] * 2, [place - 0.25, place + 0.25], color=series(1), linewidth=2.5)
        axes.set_yticks(range(len(outcomes)), [plain(outcome.arm.name) for outcome in outcomes])
        axes.invert_yaxis()
        axes.set_xlabel(f"test loss ({unit})")
        axes.grid(axis="x", linewidth=0.6)

    size = (8, 1.0 + 0.32 * len(outcomes))
    reading = "A dot a seed, the bar their mean. The seed decides the start, the order of the data and dropout."
    return Panel("Spread over seeds", reading, svg("compare-seeds", "Test loss of each arm and seed", size, draw))


def curves(outcomes: Sequence[Outcome], unit: str) -> Panel:
    """Training and validation loss against steps, at the best rate on the first seed."""

    def draw(figure: Figure) -> None:
        training, validation = figure.subplots(1, 2)
        for outcome, (colour, style, mark) in zip(outcomes, looks(), strict=False):
            history = next(iter(outcome.seeds.values())).history
            name = plain(outcome.arm.name)
            training.plot(*points(history, "loss"), style, color=colour, linewidth=1.4)
            line = points(history, "eval_loss")
            validation.plot(*line, style, color=colour, marker=mark, markersize=4, linewidth=1.6, label=name)
        for axes, what in ((training, "training"), (validation, "validation")):
            axes.set(xlabel="optimizer step", ylabel=f"{what} loss ({unit})")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(linewidth=0.6)
        legend_below(figure, validation)

    size = (9, 3.6 + 0.22 * math.ceil(len(outcomes) / 4))
    reading = "The first seed, each arm at its best rate. Training loss is of the batches just trained on."
    return Panel("Loss along the run", reading, svg("compare-curves", "Loss against optimizer step", size, draw))


def rates(outcomes: Sequence[Outcome], unit: str) -> Panel:
    """Validation loss against the learning rate."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for outcome, (colour, style, mark) in zip(outcomes, looks(), strict=False):
            tried = {rate: trial.validation.loss for rate, trial in outcome.ladder.tried.items()}
            shown = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
            line = (list(shown), list(shown.values()))
            axes.plot(*line, style, color=colour, marker=mark, markersize=4, label=plain(outcome.arm.name))
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="peak learning rate", ylabel=f"validation loss ({unit})")
        axes.grid(linewidth=0.6)
        legend_below(figure, axes)

    diverged = [
        f"{outcome.arm.name} at {rate:.3g}"
        for outcome in outcomes
        for rate, trial in outcome.ladder.tried.items()
        if not math.isfinite(trial.validation.loss)
    ]
    reading = "The first seed: factors of two, until the rates on both sides of the best did worse."
    if diverged:
        reading += f" Diverged: {', '.join(diverged)}."
    rows = [
        [outcome.arm.name, f"{rate:.3g}", f"{trial.validation.loss:.4f}", f"{trial.test.loss:.4f}"]
        for outcome in outcomes
        for rate, trial in outcome.ladder.tried.items()
    ]
    size = (8, 3.6 + 0.22 * math.ceil(len(outcomes) / 4))
    drawing = svg("compare-rates", "Loss against learning rate", size, draw)
    return Panel(
        "How the learning rates were chosen", reading, drawing, Table(["arm", "rate", "validation", "test"], rows)
    )


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
