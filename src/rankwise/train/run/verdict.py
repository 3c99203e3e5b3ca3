"""The page's first lines: what was trained, whether it helped, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.report.history import History, points
from rankwise.train.recipe import Recipe
from rankwise.train.section import Method
from rankwise.train.tasks.base import Figures

_BETTER_EARLIER = 1.01  # by how much the held-out loss must have been lower before the end to be spoken of


def verdict(recipe: Recipe, metrics: Mapping[str, Any], figures: Figures, history: History, layers: int) -> list[str]:
    """Three sentences, or four.

    Args:
        metrics: a run's ``metrics.json``.
        figures: what its task shows of them.
        history: what its trainer logged.
        layers: how many are adapted.
    """
    return [_what(recipe, metrics, layers), *_whether(metrics, figures, history), _cost(metrics, history)]


def _what(recipe: Recipe, metrics: Mapping[str, Any], layers: int) -> str:
    return (
        f"A rank-{recipe.rank} adapter (variant {_name(recipe.variant)}, init {_name(recipe.init)}) on {layers} layers "
        f"of {Path(recipe.model).name}: {metrics['steps']:,} steps of {_name(recipe.optimizer)} at "
        f"{metrics['learning_rate']:.3g} on {metrics['train_samples']:,} samples of {recipe.data_name}."
    )


def _name(method: Method) -> str:
    return method if isinstance(method, str) else str(method["name"])


def _whether(metrics: Mapping[str, Any], figures: Figures, history: History) -> list[str]:
    before, after = metrics["eval_loss_before"], metrics["eval_loss_after"]
    if before is None:
        return ["Whether it helped is not known, as no samples were held out: eval_split: 0.05 holds some out."]
    way = "It helped: the held-out loss fell" if after < before else "It did not help: the held-out loss rose"
    said = [
        f"{way} by {abs(after - before):.3f}, from {before:.3f} to {after:.3f}{''.join(map(_figure, figures.items()))}."
    ]
    steps, losses = points(history, "eval_loss")
    lowest = min(losses)
    if lowest * _BETTER_EARLIER < after and lowest < before:
        said.append(
            f"It was lower after step {steps[losses.index(lowest)]:,} ({lowest:.3f}): fewer steps, a lower learning "
            "rate or more data would do better."
        )
    return said


def _figure(figure: tuple[str, tuple[str, str]]) -> str:
    label, (before, after) = figure
    return f"; {label}: from {before} to {after}" if before else f"; {label}: {after}"


def _cost(metrics: Mapping[str, Any], history: History) -> str:
    seconds, (_, speeds), (_, peaks) = (
        metrics["train_seconds"],
        points(history, "tokens_per_second"),
        points(history, "peak_memory_gib"),
    )
    measured = [f"{sorted(speeds)[len(speeds) // 2]:,.0f} tokens a second" if speeds else ""]
    measured += [f"{max(peaks):.1f} GiB at most" if peaks else ""]
    rest = "".join(f", {text}" for text in measured if text)
    return f"It took {_duration(seconds)}{rest}; {metrics['trainable_parameters']:,} numbers were trained."


def _duration(seconds: float) -> str:
    """In the two largest units.

    >>> _duration(59.6), _duration(3700), _duration(7500)
    ('60 s', '62 min', '2 h 5 min')
    """
    minutes = math.floor(seconds / 60 + 0.5)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
