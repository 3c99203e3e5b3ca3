"""The commands that take adapters, and `methods`. Each imports what it needs when it runs; `--help` does not wait."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.app import Adapter, Adapters, Base, place, terminal, text_of, uncollected
from rankwise.errors import SpecError
from rankwise.files import expand_user

_ENGINES = "peft, vllm, sglang, llama.cpp, ollama, mlx"  # of rankwise.inspection.engines, which takes time to import


def merge(
    adapter: Adapter,
    out: Annotated[Path, place("Directory for the merged model; must not hold files yet.")],
    base: Base = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    most_lost: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the change that rounding may swallow; more is refused. 1: any."),
    ] = 0.7,
    quantise: Annotated[
        str | None,
        typer.Option(help="Round to what this storage can hold: nf4, fp4 or int8 (bitsandbytes), int4 (torchao)."),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(parser=expand_user, metavar="TEXT", help="With --quantise: data whose outputs are to be kept."),
    ] = None,
    batch_count: Annotated[int, typer.Option(min=1, help="Batches of it: 4 samples of 128 tokens each.")] = 32,
) -> None:
    """Fold an adapter into its base model and save a plain transformers model."""
    if quantise is not None:
        _merge_quantised(adapter, base, out, quantise, batches, batch_count, max_shard_size)
        return
    if batches is not None:
        raise SpecError("--batches: says whose outputs rounding is to keep; expected --quantise with it")
    with uncollected():
        from rankwise.train.model.busy import busy
        from rankwise.train.model.merged import save_merged
        from rankwise.train.run.tables import merge_table

    console = terminal()
    with busy(console, "Folding the adapter into the model"):
        report = save_merged(adapter, base, out, most_lost=most_lost, max_shard_size=max_shard_size)
    console.print(merge_table(report, out))


def _merge_quantised(
    adapter: Path, base: str | None, out: Path, to: str, batches: str | None, count: int, max_shard_size: str
) -> None:
    with uncollected():
        from rankwise.train.quantised import save_quantised
        from rankwise.train.run.tables import quantised_table

    console = terminal()
    quantised = save_quantised(
        adapter, base, out, to, console, batches=batches, batch_count=count, max_shard_size=max_shard_size
    )
    console.print(quantised_table(quantised.weights, quantised.divergence, out))


def squeeze(
    adapter: Adapter,
    out: Annotated[Path, place("Directory for the squeezed adapter; must not hold files yet.")],
    rank: Annotated[int | None, typer.Option(help="Rank of every layer.")] = None,
    budget: Annotated[int | None, typer.Option(help="Numbers in all; ranks go where they save the most.")] = None,
    error: Annotated[float | None, typer.Option(help="Share of the change that may be lost, such as 0.05.")] = None,
) -> None:
    """Cut an adapter down to fewer ranks: the nearest that a rank, a budget or an error allows."""
    with uncollected():
        from rankwise.cli.values import save_squeezed, value_table

    squeezed = save_squeezed(adapter, out, rank=rank, budget=budget, error=error)
    terminal().print(value_table("Squeezed", squeezed, out))


def combine(
    adapters: Adapters,
    out: Annotated[Path, place("Directory for the one adapter; must not hold files yet.")],
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
    terminal().print(value_table("Combined", combined, out))


def extract(
    fine_tuned: Annotated[
        str, typer.Argument(parser=expand_user, metavar="FINE_TUNED", help="The model after full fine-tuning.")
    ],
    base: Annotated[
        str, typer.Argument(parser=expand_user, metavar="BASE", help="The model that it was fine-tuned from.")
    ],
    out: Annotated[Path, place("Directory for the adapter; must not hold files yet.")],
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
    terminal().print(value_table("Extracted", extracted, out))


def convert(
    adapter: Adapter,
    out: Annotated[Path, place("Directory for the LoRA; must not hold files yet.")],
    rank: Annotated[int | None, typer.Option(help="Rank of every layer.")] = None,
    error: Annotated[float | None, typer.Option(help="Share of each layer's change that may be lost.")] = None,
    base: Base = None,
) -> None:
    """Turn an adapter of any of PEFT's kinds (LoHa, LoKr, OFT, VeRA, DoRA ...) into the nearest LoRA."""
    with uncollected():
        from rankwise.cli.values import save_converted, value_table

    converted = save_converted(adapter, base, out, rank=rank, error=error)
    terminal().print(value_table("Converted", converted, out))


def export(
    adapter: Adapter,
    engine: Annotated[str, typer.Option("--for", metavar="ENGINE", help=f"One of {_ENGINES}.")],
    out: Annotated[Path | None, place("Directory to write; must not hold files yet. Default: ADAPTER-ENGINE.")] = None,
    base: Base = None,
    rank: Annotated[int | None, typer.Option(help="Write the nearest plain LoRA of this rank instead.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Or the nearest that loses this share of each layer's change.")
    ] = None,
) -> None:
    """Write an adapter as an engine reads it right: in its format, or merged where no adapter of its says it."""
    with uncollected():
        from rankwise.cli.values import save_export

    exported = save_export(adapter, engine, base, out, rank=rank, error=error)
    lost = f"; {exported.error:.2%} of the change is lost" if exported.error else ""
    terminal().print(f"The {exported.form} for {exported.engine} is in {exported.directory}{lost}", highlight=False)
    terminal().print(exported.start, highlight=False, soft_wrap=True)


def doctor(
    adapter: Adapter,
    engines: Annotated[
        list[str] | None, typer.Option("--for", metavar="ENGINE", help=f"Of {_ENGINES}. Default: all.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            parser=expand_user, metavar="TEXT", help="Base model, to look up its layers' names; loads no weights."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what engines would refuse, drop, mis-scale or misread of an adapter, and what `export` would write.

    Exit code 0 if all engines asked about read it right as it stands, 1 if one does not.
    """
    import rankwise as rw
    from rankwise.cli.inspection import diagnosis
    from rankwise.inspection.engines import ENGINES

    layout = None
    if base is not None:
        with uncollected():
            from rankwise.cli.values import skeleton_of

        layout = skeleton_of(adapter, base)
    verdicts = rw.doctor(adapter, engines or tuple(ENGINES), base=layout)
    if as_json:
        typer.echo(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    else:
        terminal().print(*diagnosis(verdicts), sep="\n")
    if any(verdict.answer != "yes" for verdict in verdicts):
        raise typer.Exit(1)


def inspect(
    adapter: Adapter,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Look too for what ordinary adapters do not have, beside the base's weights.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            parser=expand_user,
            metavar="TEXT",
            help="With --deep: the base model; default: the one that the adapter names, if it is a directory here.",
        ),
    ] = None,
) -> None:
    """Say what is in an adapter directory, without trusting it or loading a model. Exit code 1 if `load` refuses it."""
    from rankwise.cli.inspection import report
    from rankwise.inspection.inspection import inspect as inspected

    if base is not None and not deep:
        raise SpecError("--base: what is in the directory is looked at without a base; expected --deep with it")
    inspection = inspected(adapter)
    facts, tables = inspection.to_dict(), [*report(inspection)]
    if deep and inspection.engines:  # else it is refused, or too large to be looked at
        with uncollected():
            from rankwise.cli.scanning import report as deep_report
            from rankwise.cli.scanning import scanned

        scan, files = scanned(adapter, base)
        facts["scan"] = scan.to_dict()
        tables.extend(deep_report(scan, files))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        terminal().print(*tables, sep="\n")
    if inspection.problems:
        raise typer.Exit(1)


def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Option(parser=text_of, metavar="TEXT", help="Text to continue.")],
    base: Base = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Send the prompt through the model's chat template. Default: if the adapter was trained on chats.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Answer a prompt with the pretrained model and with the adapted one."""
    with uncollected():
        from rankwise.train.model.busy import busy
        from rankwise.train.model.generation import answer
        from rankwise.train.run.tables import sample_table

    console = terminal()
    with busy(console, "Answering, without the adapter and with it"):
        sample = answer(adapter, base, prompt, chat=chat, max_new_tokens=max_new_tokens)
    console.print(sample_table(sample))


def analyze(
    adapters: Adapters,
    out: Annotated[Path, place("The page; its numbers go beside it as JSON.")] = Path("analysis.html"),
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
    prompt: Annotated[
        list[str] | None,
        typer.Option(parser=text_of, metavar="TEXT", help="Text to continue with and without each adapter."),
    ] = None,
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
    console = terminal()
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


def push(
    adapter: Adapter,
    repository: Annotated[str, typer.Argument(parser=text_of, metavar="USER/NAME", help="Made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A repository made now is seen by you alone.")] = False,
) -> None:
    """Upload an adapter to a model hub, as you are logged in there."""
    with uncollected():
        from rankwise.pushing import push as pushed
        from rankwise.train.model.busy import busy

    console = terminal()
    with busy(console, "Uploading"):
        address = pushed(adapter, repository, private=private)
    console.print(f"The adapter is at {address}", highlight=False)


def methods() -> None:
    """List the initialisations, scales, variants, optimizers and ways to combine adapters, with their papers."""
    from rankwise.cli.methods import methods_tables

    for table in methods_tables():
        terminal().print(table)
