"""The loss curve of a run, or of several beside each other, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart by colour-blind readers too, and in grey print by lightness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

History = list[dict[str, Any]]


def points(history: History, key: str) -> tuple[list[int], list[float]]:
    """The steps and values at which a trainer logged `key`.

    >>> points([{"step": 10, "loss": 1.5}, {"step": 10, "eval_loss": 1.4}], "eval_loss")
    ([10], [1.4])
    """
    found = [(int(row["step"]), float(row[key])) for row in history if key in row]
    return [step for step, _ in found], [value for _, value in found]


def save_loss_curve(runs: Mapping[str, History], path: Path, title: str, unit: str = "nats per token") -> Path:
    """Draw training loss (thin) and held-out loss (thick, marked) of every run into `path`."""
    # The object interface: pyplot would keep a global figure and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, history), colour in zip(runs.items(), _COLOURS, strict=False):
        prefix = f"{name}: " if len(runs) > 1 else ""
        axes.plot(*points(history, "loss"), color=colour, linewidth=1, alpha=0.55, label=f"{prefix}training")
        steps, losses = points(history, "eval_loss")
        if losses:
            label = f"{prefix}held out, {losses[-1]:.3f} at the end"
            axes.plot(steps, losses, color=colour, linewidth=2.2, marker="o", markersize=5, label=label)
    axes.set(title=title, xlabel="optimizer step", ylabel=f"loss ({unit})")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return path
