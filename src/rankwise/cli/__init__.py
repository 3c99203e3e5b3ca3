"""The command line: parse → spec → one call. Run `rankwise --help`."""

from rankwise.cli.app import app

__all__ = ["app"]
