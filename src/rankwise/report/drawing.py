"""Drawings that take the page's colours, light or dark, as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from itertools import cycle, product
from typing import Any
from xml.sax.saxutils import escape

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours that no drawing uses stand for the page's own, and are replaced by them in the SVG.
INK, GRID = "#010203", "#040506"
_SERIES = ("#0a0101", "#0a0102", "#0a0103", "#0a0104", "#0a0105", "#0a0106")
_PAGE_COLOURS = {INK: "var(--ink)", GRID: "var(--grid)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)
}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plain(name: str) -> str:
    """A name to be drawn as it is: matplotlib would read what stands between two dollar signs as a formula."""
    return name.replace("$", r"\$")


def series(number: int) -> str:
    """The colour of the n-th line, from 0."""
    return _SERIES[number % len(_SERIES)]


# Line and mark; six colours in each, so that as many lines as a comparison has look different.
_LINES = (("-", "o"), ("--", "s"), (":", "^"))


def looks() -> Iterator[tuple[str, str, str]]:
    """(colour, line, mark) of the first line, the second and so on."""
    return ((series(number), line, mark) for (line, mark), number in cycle(product(_LINES, range(6))))


_LETTERS_PER_INCH = 12  # of the legend's type
_HANDLE = 6  # letters that a line's sample and the gap take


def legend_below(figure: Figure, axes: Axes) -> None:
    """Name the lines of some axes below the figure, as many beside each other as it has room for."""
    handles, labels = axes.get_legend_handles_labels()
    widest = max((len(label) for label in labels), default=0) + _HANDLE
    columns = int(figure.get_figwidth() * _LETTERS_PER_INCH / widest)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(max(columns, 1), 4))


def svg(name: str, described: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw on a figure of ``size`` inches and return it as an SVG element.

    Args:
        name: told apart from the page's other drawings by it.
        described: what a reader who cannot see it is told.
    """
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        lay_out(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'font: ([\d.]+)px [^;"]*', r"font: \1px inherit; font-family: inherit", text)
    for placeholder, colour in _PAGE_COLOURS.items():
        text = text.replace(placeholder, colour)
    label = escape(described, {'"': "&quot;"})
    return re.sub(r"<svg [^>]*?viewBox", f'<svg role="img" aria-label="{label}" viewBox', text, count=1)


def lay_out(figure: Figure) -> None:
    """Lay the figure out now. Left to ``savefig``, that takes a drawing of its own, thrown away."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine(None)


def heatmap(
    axes: Axes,
    values: Any,
    *,
    rows: list[str],
    columns: list[str],
    limits: tuple[float, float],
    format_: str = "{:.2g}",
) -> Any:
    """A grid of coloured cells; nan cells stay empty. Returns what a colour bar is made of."""
    mesh = axes.pcolormesh(values, cmap="viridis", vmin=limits[0], vmax=limits[1], edgecolors="none", antialiased=False)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [plain(row) for row in rows])
    step = max(1, -(-len(columns) // 16))
    axes.set_xticks([i + 0.5 for i in range(0, len(columns), step)], columns[::step])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


_LIGHT = {"ink": "#1d2126", "grid": "#d9d6d0"} | {
    f"series-{number}": colour
    for number, colour in enumerate(("#0b5c9a", "#c2510a", "#00795a", "#a5487f", "#8a6400", "#3d6f8e"), 1)
}


def standalone(drawing: str) -> str:
    """An inline drawing as an SVG file of its own, in the page's light colours on white."""
    for name, colour in _LIGHT.items():
        drawing = drawing.replace(f"var(--{name})", colour)
    drawing = drawing.replace("font-family: inherit", "font-family: sans-serif")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return drawing.replace("<svg ", f'<svg {spaces} style="background: #fff" ', 1)
