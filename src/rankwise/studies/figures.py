"""A study's results → panels of its page."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from statistics import fmean, stdev

from matplotlib.figure import Figure

from rankwise.report.drawing import INK, series, svg
from rankwise.report.figures import Panel, Table
from rankwise.studies.arms import Arm
from rankwise.studies.intrinsic_dimension import SHARE, Dimension, IntrinsicDimension


def beside_seed_means(arms: Mapping[str, Arm]) -> dict[str, list[float]]:
    """Arm → its loss less the mean over all arms, seed by seed.

    A seed decides the data order and which samples are held out, so that losses compare within a seed only.
    """
    seeds = list(next(iter(arms.values())).losses)
    means = {seed: fmean(arm.losses[seed] for arm in arms.values()) for seed in seeds}
    return {name: [arm.losses[seed] - means[seed] for seed in seeds] for name, arm in arms.items()}


def arms_panel(name: str, title: str, arms: Mapping[str, Arm], unit: str) -> Panel:
    """Every arm at its best rate, a mark a seed."""
    gaps = beside_seed_means(arms)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        for place, values in enumerate(gaps.values()):
            axes.plot([place] * len(values), values, "o", color=series(0), alpha=0.6, markersize=6)
            axes.plot([place - 0.22, place + 0.22], [fmean(values)] * 2, color=series(1), linewidth=2.5)
        axes.set_xticks(range(len(gaps)), list(gaps))
        axes.set(ylabel=f"held-out loss, less the\nseed's mean over arms ({unit})")
        axes.grid(axis="y", linewidth=0.6)

    best = min(gaps, key=lambda arm: fmean(gaps[arm]))
    worst = max(gaps, key=lambda arm: fmean(gaps[arm]))
    within = fmean(stdev(values) for values in gaps.values()) if len(next(iter(gaps.values()))) > 1 else 0.0
    reading = (
        f"Lower is better; a dot a seed, the bar their mean. Best: {best} ({fmean(gaps[best]):+.4f}), worst: {worst} "
        f"({fmean(gaps[worst]):+.4f}); standard deviation over seeds of one arm: {within:.4f}."
    )
    rows = [
        [
            arm,
            str(measured.rank),
            f"{measured.parameters:,}",
            f"{measured.learning_rate:g}" + ("" if measured.bracketed else " (at the edge)"),
            f"{measured.mean:.4f}",
            f"{fmean(gaps[arm]):+.4f}",
            " ".join(f"{gap:+.4f}" for gap in gaps[arm]),
        ]
        for arm, measured in arms.items()
    ]
    head = ["arm", "rank", "parameters", "best rate", "loss, mean", "beside the seed's mean", "by seed"]
    return Panel(title, reading, svg(name, title, (8, 3.4), draw), Table(head, rows))


def rates_panel(name: str, arms: Mapping[str, Arm], unit: str) -> Panel:
    """Held-out loss against the learning rate: how each arm's rate was found."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, ((arm, measured), style) in enumerate(zip(arms.items(), cycle(("-", "--")), strict=False)):
            rates, losses = list(measured.tried), list(measured.tried.values())
            axes.plot(rates, losses, style, marker="o", markersize=4, color=series(number), label=arm)
        axes.set_xscale("log", base=2)
        ticks = sorted({rate for measured in arms.values() for rate in measured.tried})
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.set(xlabel="peak learning rate", ylabel=f"held-out loss ({unit})")
        axes.grid(linewidth=0.6)
        axes.legend(ncols=2)

    edge = [arm for arm, measured in arms.items() if not measured.bracketed]
    reading = "The first seed. " + (
        f"Not bracketed from both sides: {', '.join(edge)}."
        if edge
        else "Every arm's best rate did better than the rates on both sides of it."
    )
    return Panel("How the learning rates were chosen", reading, svg(name, "Loss against learning rate", (8, 3.4), draw))


def _reached(kind: str, search: Dimension) -> str:
    if search.d90 is None:
        return f"{kind} d₉₀ above {max(search.tried):,}"
    return f"{kind} d₉₀ {'at most' if search.d90 == min(search.tried) else '='} {search.d90:,}"


def intrinsic_panel(outcome: IntrinsicDimension, unit: str) -> Panel:
    """Best loss against the dimension of the random subspace."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (kind, search) in enumerate(outcome.searches.items()):
            losses = [tuned.loss for tuned in search.tried.values()]
            axes.plot(list(search.tried), losses, marker="o", color=series(number), label=kind, linewidth=2)
        levels = {
            "pretrained": outcome.pretrained,
            f"goal: {SHARE:.0%}": outcome.goal,
            "all weights": outcome.full.loss,
        }
        for label, loss in levels.items():
            axes.axhline(loss, color=INK, linewidth=0.9, linestyle=":", alpha=0.7)
            axes.annotate(label, (1.01, loss), xycoords=("axes fraction", "data"), va="center")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="dimension d of the subspace", ylabel=f"held-out loss ({unit})")
        axes.grid(linewidth=0.6)
        axes.legend(loc="lower left")

    reached = ", ".join(_reached(kind, search) for kind, search in outcome.searches.items())
    reading = f"{reached}, of {outcome.weights:,} weights."
    if not outcome.full.bracketed:
        reading += " The rate for training all weights is at the edge of what was tried: the goal may be too easy."
    rows = [
        [kind, f"{dimension:,}", f"{tuned.rate:g}" + ("" if tuned.bracketed else " (at the edge)"), f"{tuned.loss:.4f}"]
        for kind, search in outcome.searches.items()
        for dimension, tuned in search.tried.items()
    ]
    table = Table(["projection", "dimension", "best rate", "held-out loss"], rows)
    return Panel("Intrinsic dimension", reading, svg("intrinsic", "Loss against dimension", (8, 3.6), draw), table)
