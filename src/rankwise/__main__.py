"""`python -m rankwise`, for launchers that start a module."""

from rankwise.cli import app

app()
