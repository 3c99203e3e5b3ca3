"""The command line's application: how it ends, what all commands share. The commands are in the modules beside it."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.text import Text
from typer.core import TyperGroup

from rankwise import __version__
from rankwise.cli.terminal import Terminal, check_stderr, error_terminal
from rankwise.errors import RankwiseError, RunStopped
from rankwise.files import expand_user, is_text

_STOPPED_BY = 128  # and the number of a signal: what a shell reports for a process that it ended


class _Group(TyperGroup):
    """Prints rankwise's own errors as a message with exit code 2; any other error is a bug and shows its trace.

    A run that a signal stopped, saved, has the exit code that shells and schedulers know for it: 143 for SIGTERM, 130
    for Ctrl-C.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        check_stderr()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RunStopped as stopped:
            error_terminal().print(str(stopped), style="yellow", highlight=False)
            raise typer.Exit(_STOPPED_BY + stopped.signal) from None
        except RankwiseError as error:
            if ctx.params.get("traceback"):
                raise
            error_terminal().print(Text.assemble((type(error).__name__, "bold red"), f": {error}"))
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # --learning_rate, as transformers' users type it, is --learning-rate.
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    help="LoRA fine-tuning that keeps step with full fine-tuning.",
)


def text_of(text: str) -> str:
    """What is typed, in letters.

    Raises:
        ValueError: it has bytes that stand for none.
    """
    if not is_text(text):
        raise ValueError("text in UTF-8")
    return text


def path_of(text: str | Path) -> Path:
    """A path as it is typed, or an option's default."""
    return Path(expand_user(str(text)))


RecipeFile = Annotated[
    Path | None,
    typer.Argument(parser=path_of, metavar="RECIPE.yaml", help="The recipe; the flags below win over its fields."),
]
Adapter = Annotated[
    Path, typer.Argument(parser=path_of, metavar="ADAPTER", help="Adapter directory, rankwise's or PEFT's.")
]
Adapters = Annotated[list[Path], typer.Argument(parser=path_of, metavar="ADAPTER...", help="Adapter directories.")]
Base = Annotated[
    str | None,
    typer.Option(parser=expand_user, metavar="TEXT", help="Base model; default: the one that the adapter names."),
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Ray cluster that trains the arms: auto, ray://HOST:10001, or local."),
]


def place(help: str) -> Any:
    """A path to write to."""
    return typer.Option(parser=path_of, metavar="PATH", help=help)


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without garbage collections: those then, later, and at the end of the process take a third of its time."""
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # what is imported stays
        gc.enable()


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"rankwise {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="RANKWISE_DEBUG", help="Show the full trace of an error.")
    ] = False,
) -> None:
    """LoRA fine-tuning that keeps step with full fine-tuning."""
    # Where it is installed, importing it says which of its kernels this machine lacks; nothing here asked for them.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logger = logging.getLogger("rankwise")  # says which choices were made, and why
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(
            RichHandler(console=Terminal(stderr=True), show_time=False, show_level=False, show_path=False)
        )


def terminal() -> Terminal:
    """The terminal; of several processes that a launcher started, the first one's alone."""
    return Terminal(quiet=os.environ.get("RANK", "0") != "0")
