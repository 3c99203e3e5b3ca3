"""The model card: what was trained on what, how, with which result, and how to load it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

from rankwise.train.model.generation import Sample
from rankwise.train.recipe import Recipe
from rankwise.train.run.tables import squeeze_text
from rankwise.train.tasks.base import Figures


def save_model_card(
    directory: Path,
    *,
    adapter: Path,
    title: str,
    recipe: Recipe,
    metrics: dict[str, Any],
    figures: Figures,
    curve: Path,
    sample: Sample | None,
) -> Path:
    """Write `README.md` into a directory that is to lie at `adapter`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rankwise.train.run", "."), undefined=jinja2.StrictUndefined, autoescape=False
    )
    environment.filters |= {"cell": _cell, "squeeze_text": squeeze_text}
    text = environment.get_template("model_card.md.jinja").render(
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False).strip(),
        title=title,
        version=version("rankwise"),
        metrics=metrics,
        figures=figures,
        curve=curve.name,
        adapter=adapter.as_posix(),
        sample=sample,
    )
    path = directory / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _cell(text: str) -> str:
    """Text that stays inside one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")
