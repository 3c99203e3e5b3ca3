"""The page's figures: numbers → a drawing, a line that says how to read it, and the numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from rankwise.analysis import Alignment
from rankwise.report.drawing import INK, heatmap, plain, series, svg
from rankwise.report.history import History, points
from rankwise.report.measure import LOST_TO, AgainstBase, Similarity, SiteMeasures, by_module

OPTIMIZER_NAMES = {"sgd": "SGD", "adamw": "Adam"}


@dataclass(frozen=True)
class Table:
    """Numbers as text."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Panel:
    """One figure of the page.

    Attributes:
        title: with the unit.
        reading: what it says here, in a line.
        svg: the drawing; empty where the table is the figure.
        table: its numbers.
    """

    title: str
    reading: str
    svg: str = ""
    table: Table | None = None


def draw_losses(axes: Axes, runs: Mapping[str, History], unit: str, colours: Sequence[str]) -> None:
    """Training loss (thin) and held-out loss (thick, marked) of every run."""
    for (name, history), colour in zip(runs.items(), cycle(colours), strict=False):
        prefix = f"{plain(name)}: " if len(runs) > 1 else ""
        axes.plot(*points(history, "loss"), color=colour, linewidth=1, alpha=0.55, label=f"{prefix}training")
        steps, losses = points(history, "eval_loss")
        if losses:
            label = f"{prefix}held out, {losses[-1]:.3f} at the end"
            axes.plot(steps, losses, color=colour, linewidth=2.2, marker="o", markersize=5, label=label)
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08)
    axes.grid(linewidth=0.6)
    axes.legend(frameon=False)


def losses(runs: Mapping[str, History], unit: str) -> Panel:
    """The loss curves."""

    def draw(figure: Figure) -> None:
        draw_losses(figure.add_subplot(), runs, unit, [series(i) for i in range(6)])

    ends = [
        f"{name} {points(history, 'eval_loss')[1][-1]:.3f}" for name, history in runs.items() if _evaluated(history)
    ]
    reading = "Lower is better. Thin: the batch just trained on; thick: held-out samples."
    if ends:
        reading += (
            f" Held out at the end: {', '.join(ends)}."
            if len(ends) > 1
            else f" Held out at the end: {ends[0].split()[-1]}."
        )
    return Panel(f"Loss ({unit})", reading, svg("losses", "Loss against optimizer step", (8, 3.6), draw))


# Title → the logged quantities that are drawn beside each other: (key, its axis).
_OF_TRAINING = {
    "Learning rate and gradient norm": (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")),
    "Speed and memory": (("tokens_per_second", "tokens a second"), ("peak_memory_gib", "peak memory (GiB)")),
}
_READINGS = {
    "Learning rate and gradient norm": "The norm is that before clipping. Spikes that the loss has too ask for a lower "
    "rate or a look at the samples.",
    "Speed and memory": "Of one process, evaluations and checkpoints left out; the memory is the most held so far.",
}


def training(runs: Mapping[str, History]) -> list[Panel]:
    """How the training went, beside its loss; nothing of runs that did not log it."""
    panels = []
    for title, quantities in _OF_TRAINING.items():
        if all(points(history, key)[0] for history in runs.values() for key, _ in quantities) and runs:
            drawing = svg(
                title.split()[0].lower(), f"{title} against optimizer step", (8, 2.6), _beside(runs, quantities)
            )
            panels.append(Panel(title, _READINGS[title], drawing))
    return panels


def _beside(runs: Mapping[str, History], quantities: Sequence[tuple[str, str]]) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        for axes, (key, label) in zip(figure.subplots(1, len(quantities)), quantities, strict=True):
            for i, (name, history) in enumerate(runs.items()):
                axes.plot(*points(history, key), color=series(i), linewidth=1.4, label=plain(name))
            axes.set(xlabel="optimizer step", ylabel=label)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(linewidth=0.6)
        if len(runs) > 1:
            axes.legend(frameon=False)

    return draw


def _evaluated(history: History) -> bool:
    return bool(points(history, "eval_loss")[1])


def layer_map(
    name: str,
    title: str,
    sites: Sequence[SiteMeasures],
    value: Callable[[SiteMeasures], float],
    reading: str,
    *,
    limits: tuple[float, float] | None = None,
    shown: str = "{:.3g}",
) -> Panel:
    """A figure for every site: layers across, modules down."""
    modules = list(dict.fromkeys(site.module for site in sites))
    layers = sorted({-1 if site.layer is None else site.layer for site in sites})
    grid = [[math.nan] * len(layers) for _ in modules]
    for site in sites:
        grid[modules.index(site.module)][layers.index(-1 if site.layer is None else site.layer)] = value(site)
    names = ["–" if layer < 0 else str(layer) for layer in layers]
    values = [value(site) for site in sites]
    low, high = (min(values), max(values)) if limits is None else limits

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        mesh = heatmap(axes, grid, rows=modules, columns=names, limits=(low, high if high > low else low + 1))
        axes.set_xlabel("layer")
        bar = figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03)
        bar.outline.set_visible(False)

    largest, smallest = (pick(sites, key=value) for pick in (max, min))
    reading = (
        f"{reading} Mean {shown.format(fmean(values))}; largest {shown.format(value(largest))} at {largest.name}, "
        f"smallest {shown.format(value(smallest))} at {smallest.name}."
    )
    table = Table(
        ["module", *names],
        [
            [module, *("" if math.isnan(x) else shown.format(x) for x in row)]
            for module, row in zip(modules, grid, strict=True)
        ],
    )
    size = (max(4.5, 2.2 + 0.26 * len(layers)), 0.9 + 0.3 * len(modules))
    return Panel(title, reading, svg(name, f"{title}, by layer and module", size, draw), table)


def spectra(name: str, sites: Sequence[SiteMeasures]) -> Panel:
    """Singular values of every ΔW, one small drawing a module, a line a layer."""
    groups = [(module, members) for module, members in by_module(sites) if any(site.change for site in members)]
    columns = min(4, max(1, len(groups)))
    rows = -(-len(groups) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(groups) :]:
            axes.set_visible(False)
        for axes, (module, members) in zip(grid.flat, groups, strict=False):
            for site in members:
                values = [value for value in site.singular_values if value > 0]
                axes.plot(range(1, len(values) + 1), values, color=series(0), linewidth=0.8, alpha=0.45)
            axes.set_title(plain(module), loc="left")
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())  # their labels take most of the time of drawing
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.grid(linewidth=0.5)
        figure.supxlabel("direction", fontsize=10.5, color=INK)
        figure.supylabel("singular value", fontsize=10.5, color=INK)

    table = Table(
        ["module", "layers", "rank", "effective rank, mean", "stable rank, mean", "‖ΔW‖, mean"],
        [
            [
                module,
                str(len(members)),
                ", ".join(str(rank) for rank in sorted({site.rank for site in members})),
                f"{fmean(site.effective_rank for site in members):.1f}",
                f"{fmean(site.stable_rank for site in members):.1f}",
                f"{fmean(site.change for site in members):.3g}",
            ]
            for module, members in by_module(sites)
        ],
    )
    used = fmean(site.effective_rank / site.rank for site in sites if site.rank)
    reading = (
        f"A line a layer. Flat: all directions are used; steep: fewer would do. On average {used:.0%} of the rank is."
    )
    drawing = svg(name, "Singular values of the change, by module", (8.4, 0.6 + 1.9 * rows), draw) if groups else ""
    return Panel("Singular values of ΔW", reading, drawing, table)


def similarity(name: str, measured: Similarity) -> Panel:
    """φ(i, j) as in the LoRA paper's figure 3, one small drawing a module, its layers averaged."""
    columns = min(4, len(measured.by_module))
    rows = -(-len(measured.by_module) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(measured.by_module) :]:
            axes.set_visible(False)
        image = None
        for axes, (module, phi) in zip(grid.flat, measured.by_module.items(), strict=False):
            extent = (0.5, len(phi[0]) + 0.5, len(phi) + 0.5, 0.5)
            image = axes.imshow(
                phi, cmap="viridis", vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest"
            )
            axes.set_title(plain(module), loc="left")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            axes.spines[:].set_visible(False)
        figure.supxlabel(f"j: first directions of {plain(measured.second)}", fontsize=10.5, color=INK)
        figure.supylabel(f"i: first of {plain(measured.first)}", fontsize=10.5, color=INK)
        if image is not None:
            bar = figure.colorbar(image, ax=grid, pad=0.01, fraction=0.03)
            bar.outline.set_visible(False)

    tops = {module: phi[0][0] for module, phi in measured.by_module.items()}
    table = Table(
        ["module", "φ(1, 1)", "φ at full rank", "by chance at full rank"],
        [
            [module, f"{phi[0][0]:.3f}", f"{phi[-1][-1]:.3f}", f"{measured.by_chance[module]:.3f}"]
            for module, phi in measured.by_module.items()
        ],
    )
    reading = (
        "1: the smaller subspace lies in the larger; by chance max(i, j)/in. The first directions agree most in "
        f"{max(tops, key=tops.__getitem__)} (φ(1, 1) = {max(tops.values()):.2f}), least in "
        f"{min(tops, key=tops.__getitem__)} ({min(tops.values()):.2f})."
    )
    drawing = svg(name, "Subspace similarity by module", (8.4, 0.7 + 2.0 * rows), draw)
    return Panel(f"Subspace similarity φ(i, j): {measured.first} and {measured.second}", reading, drawing, table)


def alignments(name: str, optimizer: str, sites: Sequence[SiteMeasures], by_site: Mapping[str, Alignment]) -> Panel:
    """The cosine of the next step with full fine-tuning's at every site."""
    there = [site for site in sites if site.name in by_site]
    sizes = fmean(by_site[site.name].relative_size for site in there)
    reading = (
        "1: the adapter's step moves the weight as full fine-tuning's would; 0: unrelated. At the same learning rate "
        f"it is {sizes:.2g} times as long, on average."
    )
    title = f"Agreement with full fine-tuning's step, {OPTIMIZER_NAMES[optimizer]} (cosine)"
    low = min(0.0, *(by_site[site.name].cosine for site in there))
    return layer_map(
        name, title, there, lambda site: by_site[site.name].cosine, reading, limits=(low, 1.0), shown="{:.2f}"
    )


def alignment_over_run(measured: Mapping[int, Mapping[str, Mapping[str, Alignment]]]) -> Panel:
    """Mean cosine against the step at which it was measured."""
    steps = sorted(measured)
    means = {
        optimizer: [fmean(site.cosine for site in measured[step][optimizer].values()) for step in steps]
        for optimizer in measured[steps[0]]
    }

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (optimizer, values) in enumerate(means.items()):
            axes.plot(steps, values, color=series(number), linewidth=2, marker="o", label=OPTIMIZER_NAMES[optimizer])
        axes.set(xlabel="optimizer step", ylabel="cosine, mean over layers")
        axes.set_ylim(min(0, *(v for values in means.values() for v in values)), 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(linewidth=0.6)
        axes.legend()

    table = Table(
        ["step", *(OPTIMIZER_NAMES[name] for name in means)],
        [[str(step), *(f"{values[i]:.3f}" for values in means.values())] for i, step in enumerate(steps)],
    )
    ends = ", ".join(f"{OPTIMIZER_NAMES[name]} {values[0]:.2f} → {values[-1]:.2f}" for name, values in means.items())
    reading = f"How far the adapter's next step agrees with full fine-tuning's, along the run: {ends}."
    drawing = svg("alignment-over-run", "Agreement with full fine-tuning along the run", (8, 3), draw)
    return Panel("Agreement with full fine-tuning along the run (cosine)", reading, drawing, table)


def amplification_table(sites: Sequence[SiteMeasures]) -> Panel:
    """The LoRA paper's table 7, layers alike averaged."""
    rows, factors = [], []
    for module, members in by_module(sites):
        measures = map(against_base, members)
        amplifications = [site.amplification for site in measures if site.amplification is not None]
        if not amplifications:
            continue
        factors += [amplification.factor for amplification in amplifications]
        columns = [
            [getattr(amplification, field) for amplification in amplifications]
            for field in ("change", "along_change", "along_weight", "along_random")
        ]
        rows.append(
            [
                module,
                str(len(amplifications)),
                *(f"{fmean(column):.3g}" for column in columns),
                f"{fmean(e.factor for e in amplifications):.2g}×",
            ]
        )
    head = ["module", "layers", "‖ΔW‖", "‖UᵀWV‖ along ΔW", "along W's own", "along random", "amplification"]
    reading = (
        f"‖ΔW‖ over what W does in ΔW's directions: {min(factors):.2g} to {max(factors):.2g}. Above 1, training "
        "strengthens directions that the pretrained weight hardly uses."
        if factors
        else "The change is zero, so nothing is amplified."
    )
    return Panel("Amplification (means over layers; Frobenius norms)", reading, table=Table(head, rows))


def lost_table(sites: Sequence[SiteMeasures]) -> Panel:
    """What merging into few bits would lose."""
    rows = []
    for module, members in by_module(sites):
        lost = [against_base(site).lost for site in members]
        columns = [[shares[storage] for shares in lost] for storage in LOST_TO]
        rows.append([module, *(f"{f(column):.1%}" for column in columns for f in (fmean, max))])
    worst = {storage: max(against_base(site).lost[storage] for site in sites) for storage in LOST_TO}
    head = ["module", *(f"{storage}, {which}" for storage in LOST_TO for which in ("mean", "worst layer"))]
    shares = ", ".join(f"{share:.0%} in {storage}" for storage, share in worst.items())
    reading = (
        "Share of ΔW that rounding loses when it is merged into a base stored so (above 100 %: rounding moves the "
        f"weight further than the change does); at worst {shares}"
    )
    return Panel("What a merge would lose (share of ‖ΔW‖)", f"{reading}.", table=Table(head, rows))


def intruders_table(sites: Sequence[SiteMeasures], among: int) -> Panel:
    """Intruder dimensions by module."""
    rows, total = [], 0
    for module, members in by_module(sites):
        counts = [against_base(site).intruders or 0 for site in members]
        total += sum(counts)
        rows.append([module, str(sum(counts)), str(max(counts)), str(sum(count > 0 for count in counts))])
    reading = (
        f"Of the {among} leading directions of each changed weight, {total} in all resemble none of the pretrained "
        "weight's (every cosine below 0.5)."
    )
    head = ["module", "in all layers", "most in a layer", "layers with any"]
    return Panel("Intruder dimensions (count)", reading, table=Table(head, rows))


def against_base(site: SiteMeasures) -> AgainstBase:
    """Of a site that was measured with its base."""
    assert site.against_base is not None
    return site.against_base
