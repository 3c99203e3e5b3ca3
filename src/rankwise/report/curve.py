"""The loss curve of a run, or of several beside each other, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rankwise.disk import write_file
from rankwise.report.drawing import lay_out, plain
from rankwise.report.figures import draw_losses
from rankwise.report.history import History

# Okabe and Ito's palette: told apart by colour-blind readers too, and in grey print by lightness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def save_loss_curve(runs: Mapping[str, History], path: Path, title: str, unit: str = "nats per token") -> Path:
    """Draw training loss (thin) and held-out loss (thick, marked) of every run into `path`."""
    # The object interface: pyplot would keep a global figure and look for a display.
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=plain(title))
    draw_losses(axes, runs, unit, _COLOURS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    lay_out(figure)
    content = BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."))
    write_file(path, content.getvalue())
    return path
