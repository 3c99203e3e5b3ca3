"""The commands. Each imports what it needs when it runs, so that `--help` does not wait for transformers."""

from __future__ import annotations

import gc
import json
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
from rankwise.cli.flags import recipe_flags
from rankwise.cli.terminal import Terminal, check_stderr, error_terminal
from rankwise.errors import RankwiseError, RunStopped
from rankwise.files import expand_user
from rankwise.train import recipe as recipes

_STOPPED = 128 + 15  # what a shell reports for SIGTERM


class _Group(TyperGroup):
    """Prints rankwise's own errors as a message with exit code 2; any other error is a bug and shows its trace.

    A run that a SIGTERM stopped, saved, has the exit code that schedulers know for it: 143.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        check_stderr()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RunStopped as stopped:
            error_terminal().print(str(stopped), style="yellow", highlight=False)
            raise typer.Exit(_STOPPED) from None
        except RankwiseError as error:
            if ctx.params.get("traceback"):
                raise
            error_terminal().print(Text.assemble((type(error).__name__, "bold red"), f": {error}"))
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # --learning_rate, as transformers' users type it, is --learning-rate.
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    help="LoRA fine-tuning that keeps step with full fine-tuning.",
)


def _path(text: str) -> Path:
    return Path(expand_user(text))


RecipeFile = Annotated[
    Path | None,
    typer.Argument(parser=_path, metavar="RECIPE.yaml", help="The recipe; the flags below win over its fields."),
]
Adapter = Annotated[
    Path, typer.Argument(parser=_path, metavar="ADAPTER", help="Adapter directory, rankwise's or PEFT's.")
]
Adapters = Annotated[list[Path], typer.Argument(parser=_path, metavar="ADAPTER...", help="Adapter directories.")]
Base = Annotated[
    str | None,
    typer.Option(parser=expand_user, metavar="TEXT", help="Base model; default: the one that the adapter names."),
]


def _place(help: str) -> Any:
    return typer.Option(parser=_path, metavar="PATH", help=help)


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


def _console() -> Terminal:
    """The terminal; of several processes that a launcher started, the first one's alone."""
    return Terminal(quiet=os.environ.get("RANK", "0") != "0")


@app.command()
@recipe_flags
def train(recipe: RecipeFile = None, *, overrides: dict[str, Any]) -> None:
    """Fine-tune a model as the recipe says."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.train.run import run
        from rankwise.train.run.tables import summary

    console = _console()
    result = run.train(wanted, console)
    console.print(summary(result.metrics, result.adapter, result.page))


@app.command()
@recipe_flags
def plan(
    recipe: RecipeFile = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Say, from gradients of the data, what each rank captures of a step.")
    ] = False,
    parameters: Annotated[
        int | None, typer.Option(help="With --advise: trained parameters to share out; default: as planned.")
    ] = None,
    *,
    overrides: dict[str, Any],
) -> None:
    """Show which layers a recipe adapts, and with how many parameters. Trains nothing."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.train.run.loading import load, show_plan

    console = _console()
    loaded = load(wanted, console)
    show_plan(loaded, console)
    if advise:
        with uncollected():
            from rankwise.train.run import run  # with the trainer, which takes seconds to import

        run.advise(loaded, parameters, console)


@app.command()
@recipe_flags
def check(recipe: RecipeFile = None, *, overrides: dict[str, Any]) -> None:
    """Do everything that a run does before its first step, show what it found, and train nothing."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.train.run import run
        from rankwise.train.run.tables import data_table, samples_table

    console = _console()
    loaded = run.load(wanted, console)
    run.show_plan(loaded, console)
    prepared = run.prepare(loaded, console)
    console.print(samples_table(prepared.summary), data_table(prepared.summary, prepared.trial))
    console.print("Ready: `rankwise train` would start now.", highlight=False)


@app.command()
@recipe_flags
def init(recipe: RecipeFile = None, *, overrides: dict[str, Any]) -> None:
    """Compute a recipe's start alone and save the untrained adapter."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.train.run import run

    console = _console()
    loaded = run.load(wanted, console)
    run.show_plan(loaded, console)
    with run.saving_adapter(run.prepare(loaded, console), "start"):
        pass
    console.print(f"The untrained adapter is in {Path(wanted.output_dir) / 'start'}", highlight=False)


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, _place("Directory for the merged model; must not hold files yet.")],
    base: Base = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    most_lost: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the change that rounding may swallow; more is refused. 1: any."),
    ] = 0.7,
) -> None:
    """Fold an adapter into its base model and save a plain transformers model."""
    with uncollected():
        from rankwise.train.model.busy import busy
        from rankwise.train.model.merged import save_merged
        from rankwise.train.run.tables import merge_table

    console = _console()
    with busy(console, "Folding the adapter into the model"):
        report = save_merged(adapter, base, out, most_lost=most_lost, max_shard_size=max_shard_size)
    console.print(merge_table(report, out))


@app.command()
def squeeze(
    adapter: Adapter,
    out: Annotated[Path, _place("Directory for the squeezed adapter; must not hold files yet.")],
    rank: Annotated[int | None, typer.Option(help="Rank of every layer.")] = None,
    budget: Annotated[int | None, typer.Option(help="Numbers in all; ranks go where they save the most.")] = None,
    error: Annotated[float | None, typer.Option(help="Share of the change that may be lost, such as 0.05.")] = None,
) -> None:
    """Cut an adapter down to fewer ranks: the nearest that a rank, a budget or an error allows."""
    with uncollected():
        from rankwise.cli.values import save_squeezed, value_table

    squeezed = save_squeezed(adapter, out, rank=rank, budget=budget, error=error)
    _console().print(value_table("Squeezed", squeezed, out))


@app.command()
def combine(
    adapters: Adapters,
    out: Annotated[Path, _place("Directory for the one adapter; must not hold files yet.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of an adapter, once for each in their order. Default: 1 each.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How (see `rankwise methods`): a name or {name: ties, density: 0.5}.")
    ] = "exact",
    rank: Annotated[int | None, typer.Option(help="Rank of every layer.")] = None,
    error: Annotated[float | None, typer.Option(help="Share of each layer's change that may be lost.")] = None,
    seed: Annotated[int, typer.Option(help="Of the methods that draw.")] = 0,
    base: Base = None,
) -> None:
    """Make one LoRA adapter out of several, LoRA and DoRA. The base is loaded where one of them depends on it."""
    with uncollected():
        from rankwise.cli.values import save_combined, value_table

    combined = save_combined(adapters, weight or [], base, out, method, rank=rank, error=error, seed=seed)
    _console().print(value_table("Combined", combined, out))


@app.command()
def extract(
    fine_tuned: Annotated[
        str, typer.Argument(parser=expand_user, metavar="FINE_TUNED", help="The model after full fine-tuning.")
    ],
    base: Annotated[
        str, typer.Argument(parser=expand_user, metavar="BASE", help="The model that it was fine-tuned from.")
    ],
    out: Annotated[Path, _place("Directory for the adapter; must not hold files yet.")],
    rank: Annotated[int | None, typer.Option(help="Rank of every layer.")] = None,
    error: Annotated[float | None, typer.Option(help="Share of each layer's change that may be lost.")] = None,
    modules_to_save: Annotated[
        list[str] | None, typer.Option(help="Layers to take whole, by the ends of their names, such as norm.")
    ] = None,
) -> None:
    """Turn full fine-tuning into the nearest LoRA, and say what no LoRA holds. Reads one weight at a time."""
    with uncollected():
        from rankwise.cli.values import save_extracted, value_table

    extracted = save_extracted(fine_tuned, base, out, rank=rank, error=error, modules_to_save=modules_to_save or ())
    _console().print(value_table("Extracted", extracted, out))


@app.command("inspect")
def inspect_adapter(
    adapter: Adapter,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what is in an adapter directory, without trusting it or loading a model. Exit code 1 if `load` refuses it."""
    from rankwise.cli.inspection import report
    from rankwise.inspection.inspection import inspect

    inspection = inspect(adapter)
    if as_json:
        typer.echo(json.dumps(inspection.to_dict(), indent=2))
    else:
        _console().print(*report(inspection), sep="\n")
    if inspection.problems:
        raise typer.Exit(1)


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    base: Base = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Answer a prompt with the pretrained model and with the adapted one."""
    with uncollected():
        from rankwise.train.model.busy import busy
        from rankwise.train.model.generation import answer
        from rankwise.train.run.tables import sample_table

    console = _console()
    with busy(console, "Answering, without the adapter and with it"):
        sample = answer(adapter, base, prompt, chat=chat, max_new_tokens=max_new_tokens)
    console.print(sample_table(sample))


@app.command()
def analyze(
    adapters: Adapters,
    out: Annotated[Path, _place("The page; its numbers go beside it as JSON.")] = Path("analysis.html"),
    base: Base = None,
    batches: Annotated[
        str | None,
        typer.Option(
            parser=expand_user,
            metavar="TEXT",
            help="Training data, to compare the next step with full fine-tuning's.",
        ),
    ] = None,
    batch_count: Annotated[int, typer.Option(min=1, help="Batches of it: 4 samples of 128 tokens each.")] = 8,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue with and without each adapter.")] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Count intruder dimensions: an eigendecomposition of every weight.")
    ] = False,
    without_base: Annotated[
        bool, typer.Option("--without-base", help="Load no model: only what the factors alone say.")
    ] = False,
) -> None:
    """Measure adapters against their base, and show it on one static page."""
    with uncollected():
        from rankwise.report.page import check_place, write_report
        from rankwise.train.analyze import analyze as measured

    check_place(out)
    console = _console()
    report = measured(
        adapters,
        base,
        console,
        batches=batches,
        batch_count=batch_count,
        prompts=prompt or (),
        intruders=intruders,
        without_base=without_base,
    )
    page = write_report(report, out)
    console.print(f"The page is {page}; its numbers are in {page.with_suffix('.json')}", highlight=False)


@app.command()
@recipe_flags
def study(
    name: Annotated[str, typer.Argument(help="weight-types, ranks, subspace, amplification or intrinsic-dimension.")],
    recipe: RecipeFile = None,
    out: Annotated[Path, _place("Directory for results, pages, and runs to go on from.")] = Path("studies"),
    seeds: Annotated[int, typer.Option(help="Seeds of every arm, from the recipe's on.")] = 2,
    *,
    overrides: dict[str, Any],
) -> None:
    """Repeat an experiment of the papers on your model and data. Stopped, it goes on where it was."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.studies import run_study, write_outcome

    console = _console()
    outcome = run_study(name, wanted, out, seeds, console)
    console.print(f"The page is {write_outcome(name, outcome, wanted, seeds, out)}", highlight=False)


@app.command()
@recipe_flags
def compare(
    recipe: RecipeFile = None,
    preset: Annotated[str, typer.Option(help="Which methods: best or articles.")] = "best",
    arms: Annotated[Path | None, _place("YAML file of methods instead, a line each: `DoRA: {variant: dora}`.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of every method, from the recipe's on.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Start no run after so many.")] = None,
    steps_to_baseline: Annotated[
        bool | None,
        typer.Option(
            "--steps-to-baseline/--no-steps-to-baseline",
            help="Look how few steps each takes to the first one's loss. Default: with the preset best.",
        ),
    ] = None,
    out: Annotated[Path, _place("Directory for results, page, and runs to go on from.")] = Path("compare"),
    *,
    overrides: dict[str, Any],
) -> None:
    """Compare methods with each other and with full fine-tuning, each at its best rate. Stopped, it goes on."""
    wanted = recipes.load(recipe, overrides)
    from rankwise.compare import run_comparison, write_comparison

    comparison = run_comparison(
        wanted,
        out,
        console := _console(),
        preset=preset,
        arms_file=arms,
        seeds=seeds,
        minutes=minutes,
        steps_to_baseline=steps_to_baseline,
    )
    console.print(f"The page is {write_comparison(comparison, out)}", highlight=False)


@app.command()
def demo(
    out: Annotated[Path, _place("Directory for the demo's files.")] = Path("rankwise-demo"),
) -> None:
    """Fine-tune a small real model on real text with LoRA-GA, beside plain LoRA. Takes a few minutes."""
    with uncollected():
        from rankwise.train.demo import run_demo

    run_demo(out, _console())


@app.command()
def methods() -> None:
    """List the initialisations, scales, variants, optimizers and ways to combine adapters, with their papers."""
    from rankwise.cli.methods import methods_tables

    for table in methods_tables():
        _console().print(table)
