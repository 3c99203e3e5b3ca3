"""A tracker that a run cannot report to is named before anything costly."""

import pytest
from rich.console import Console
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.run import loading
from rankwise.train.trainer.trackers import check_trackers


def missing(*_: object) -> None:
    raise RuntimeError("It requires a package to be installed.")


@pytest.mark.parametrize("name", [*INTEGRATION_TO_CALLBACK, "unheard-of", ""])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_tracker_that_cannot_be_reported_to_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, as_list: bool
) -> None:
    if name in INTEGRATION_TO_CALLBACK:
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, missing)
    values = {"model": "no model is looked for", "data": "kjv", "report_to": ["none", name] if as_list else name}
    with pytest.raises(RecipeError, match=rf"`report_to`: {name}: expected a tracker that is installed and set up"):
        loading.load(recipes.parse(values), Console(quiet=True))


def test_those_that_are_there_and_none_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", object)
    for report_to in ("none", "all", ["none"], [], "tensorboard", ["tensorboard", "none"]):
        check_trackers(report_to)
