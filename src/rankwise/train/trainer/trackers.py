"""The services that a run reports to, such as tensorboard."""

from __future__ import annotations

from transformers.integrations import get_reporting_integration_callbacks

from rankwise.errors import RecipeError


def check_trackers(report_to: str | list[str]) -> None:
    """Refuse a tracker that a run could not report to, before the model is loaded.

    Raises:
        RecipeError: one is not known, not installed, or not set up.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    for name in names:
        if name in ("none", "all"):  # all: that are installed
            continue
        try:
            for callback in get_reporting_integration_callbacks(name):
                callback()
        except Exception as error:
            raise RecipeError(
                f"`report_to`: {name}: expected a tracker that is installed and set up, found: {error} Install it, or "
                "report to none"
            ) from error
