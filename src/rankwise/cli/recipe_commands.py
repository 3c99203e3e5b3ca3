"""The commands that take a recipe, and `demo`. Each imports what it needs when it runs; `--help` does not wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.app import Ray, RecipeFile, path_of, place, terminal, uncollected
from rankwise.cli.flags import recipe_flags
from rankwise.train import recipe as recipes
from rankwise.train import shipped


@recipe_flags
def train(
    recipe: RecipeFile = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Two steps on a tiny model and data that ship, to see it go through.")
    ] = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Fine-tune a model as the recipe says."""
    wanted = recipes.load(recipe, {**(shipped.smoke(recipe) if smoke else {}), **overrides})
    with uncollected():
        from rankwise.train.run import run
        from rankwise.train.run.tables import summary

    console = terminal()
    result = run.train(wanted, console)
    console.print(summary(result.metrics, run.task_of(wanted).figures(result.metrics), result.adapter, result.page))


@recipe_flags
def new(
    path: Annotated[Path, typer.Argument(parser=path_of, metavar="RECIPE.yaml", help="The file to write.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is offered.")] = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Write a first recipe: asks a few questions, less those that flags answer."""
    from rankwise.cli.new_recipe import answers, write_recipe

    console = terminal()
    ask = (lambda _, offered: offered) if yes else (lambda question, offered: str(typer.prompt(question, offered)))
    values = answers(ask, lambda refusal: console.print(refusal, style="yellow"), overrides)
    write_recipe(values, path)
    console.print(f"{path} is written. Next: rankwise check {path}, then rankwise train {path}", highlight=False)


@recipe_flags
def plan(
    recipe: RecipeFile = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Say, from gradients of the data, what each rank captures of a step.")
    ] = False,
    parameters: Annotated[
        int | None, typer.Option(help="With --advise: trained parameters to share out; default: as planned.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate how much memory the run will take. Loads no weights.")
    ] = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Show which layers a recipe adapts, and with how many parameters. Trains nothing."""
    wanted = recipes.load(recipe, overrides)
    if memory:
        with uncollected():
            from rankwise.train.run.memory import memory_table, plan_memory

        terminal().print(memory_table(plan_memory(wanted)))
        return
    with uncollected():
        from rankwise.train.run.loading import load, show_plan

    console = terminal()
    loaded = load(wanted, console)
    show_plan(loaded, console)
    if advise:
        with uncollected():
            from rankwise.train.run import run  # with the trainer, which takes seconds to import

        run.advise(loaded, parameters, console)


@recipe_flags
def check(recipe: RecipeFile = None, *, overrides: dict[str, Any]) -> None:
    """Do everything that a run does before its first step, show what it found, and train nothing."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.train.run import run
        from rankwise.train.run.tables import data_table, samples_table

    console = terminal()
    loaded = run.load(wanted, console)
    run.show_plan(loaded, console)
    prepared = run.prepare(loaded, console)
    console.print(samples_table(prepared.summary), data_table(prepared.summary, prepared.trial))
    console.print("Ready: `rankwise train` would start now.", highlight=False)


@recipe_flags
def init(recipe: RecipeFile = None, *, overrides: dict[str, Any]) -> None:
    """Compute a recipe's start alone and save the untrained adapter."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.train.run import run

    console = terminal()
    loaded = run.load(wanted, console)
    run.show_plan(loaded, console)
    with run.saving_adapter(run.prepare(loaded, console), "start"):
        pass
    console.print(f"The untrained adapter is in {Path(wanted.output_dir) / 'start'}", highlight=False)


@recipe_flags
def study(
    name: Annotated[str, typer.Argument(help="weight-types, ranks, subspace, amplification or intrinsic-dimension.")],
    recipe: RecipeFile = None,
    out: Annotated[Path, place("Directory for results, pages, and runs to go on from.")] = Path("studies"),
    seeds: Annotated[int, typer.Option(help="Seeds of every arm, from the recipe's on.")] = 2,
    *,
    overrides: dict[str, Any],
) -> None:
    """Repeat an experiment of the papers on your model and data. Stopped, it goes on where it was."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.studies import run_study, write_outcome

    console = terminal()
    outcome = run_study(name, wanted, out, seeds, console)
    console.print(f"The page is {write_outcome(name, outcome, wanted, seeds, out)}", highlight=False)


@recipe_flags
def compare(
    recipe: RecipeFile = None,
    preset: Annotated[str, typer.Option(help="Which methods: best or articles.")] = "best",
    arms: Annotated[Path | None, place("YAML file of methods instead, a line each: `DoRA: {variant: dora}`.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of every method, from the recipe's on.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Start no run after so many.")] = None,
    steps_to_baseline: Annotated[
        bool | None,
        typer.Option(
            "--steps-to-baseline/--no-steps-to-baseline",
            help="Look how few steps each takes to the first one's loss. Default: with the preset best.",
        ),
    ] = None,
    ray: Ray = None,
    out: Annotated[Path, place("Directory for results, page, and runs to go on from.")] = Path("compare"),
    *,
    overrides: dict[str, Any],
) -> None:
    """Compare methods with each other and with full fine-tuning, each at its best rate. Stopped, it goes on."""
    wanted = recipes.load(recipe, overrides)
    from rankwise.compare import run_comparison, write_comparison

    comparison = run_comparison(
        wanted,
        out,
        console := terminal(),
        preset=preset,
        arms_file=arms,
        seeds=seeds,
        minutes=minutes,
        steps_to_baseline=steps_to_baseline,
        ray=ray,
    )
    console.print(f"The page is {write_comparison(comparison, out)}", highlight=False)


@recipe_flags
def sweep(
    recipe: RecipeFile = None,
    arms: Annotated[Path | None, place("YAML file of arms, a line each: `wide: {rank: 32}`.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUES", help="Or their grid: `--grid rank=4,8 --grid seed=0,1`."),
    ] = None,
    prune: Annotated[str, typer.Option(help="Stop losing arms early: halving, median or none.")] = "none",
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a forward, whole batches of arms; default: as many as fit.")
    ] = None,
    ray: Ray = None,
    out: Annotated[Path, place("Directory for the arms, results and page.")] = Path("sweep"),
    *,
    overrides: dict[str, Any],
) -> None:
    """Train learning rates, ranks, seeds or methods together on one base, each as alone. Stopped, it goes on."""
    wanted = recipes.load(recipe, overrides)
    with uncollected():
        from rankwise.sweep import run_sweep, write_sweep
        from rankwise.sweep.arms import chosen_arms

    console = terminal()
    trained = run_sweep(wanted, chosen_arms(wanted, out, arms, grid), out, console, prune=prune, rows=rows, ray=ray)
    page = write_sweep(trained, out)
    console.print(f"Best: {trained.best.arm.name}, in {trained.best.arm.directory / 'adapter'}", highlight=False)
    console.print(f"The page is {page}", highlight=False)


def demo(
    out: Annotated[Path, place("Directory for the demo's files.")] = Path("rankwise-demo"),
) -> None:
    """Fine-tune a small real model on real text with LoRA-GA, beside plain LoRA. Takes a few minutes."""
    with uncollected():
        from rankwise.train.demo import run_demo

    run_demo(out, terminal())
