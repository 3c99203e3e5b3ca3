"""`serve` and `chat`. Each imports what it needs when it runs; `--help` does not wait."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rankwise.cli.app import Base, terminal, text_of, uncollected
from rankwise.files import expand_user


def named_directory(text: str) -> str:
    """``DIR`` or ``NAME=DIR``, with the user's home in the place of ``~``."""
    name, separator, directory = text.partition("=")
    return f"{name}{separator}{expand_user(directory)}" if directory.startswith("~") else expand_user(text)


Directories = Annotated[
    list[str],
    typer.Argument(
        parser=named_directory, metavar="DIR...", help="Adapter directories, directories of them, or NAME=DIR."
    ),
]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.001, max=1, help="Draw from the fewest tokens that are this likely.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from so many tokens; 0: from all.")]


def serve(
    base: Annotated[str, typer.Argument(parser=expand_user, metavar="BASE", help="The model: a name or a directory.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            parser=named_directory,
            metavar="DIR",
            help="An adapter's directory, a directory of them, or NAME=DIR. Once for each.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="RANKWISE_API_KEY", help="What requests to /v1 must bring. Default: nothing.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16, ...")] = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Answers under way together.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 256,
    max_adapters: Annotated[int, typer.Option(min=1, help="Adapters in memory; the longest unused leaves.")] = 32,
    adapter_memory: Annotated[float, typer.Option(min=0, help="GiB that they may take together.")] = 4.0,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer. Default: 4096, or the model's own.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 2**20,
    load_from_anywhere: Annotated[
        bool, typer.Option("--load-from-anywhere", help="Let requests load adapters from outside of --adapters.")
    ] = False,
    grace: Annotated[int, typer.Option(min=0, help="Seconds to finish answers in, once told to stop.")] = 30,
    engine: Annotated[Literal["rankwise", "vllm"], typer.Option(help="What answers.")] = "rankwise",
) -> None:
    """Serve a model and many adapters together, by OpenAI's API and on a web page."""
    with uncollected():
        from rankwise.serve.options import ServerOptions
        from rankwise.serve.server import serve as served

    options = ServerOptions(
        host=host,
        port=port,
        api_key=api_key,
        dtype=dtype,
        max_batch=max_batch,
        max_waiting=max_waiting,
        max_adapters=max_adapters,
        adapter_memory=adapter_memory,
        max_length=max_length,
        max_tokens=max_tokens,
        max_body=max_body,
        load_from_anywhere=load_from_anywhere,
        grace=grace,
    )
    served(base, adapters or [], options, terminal(), engine=engine)


def chat(
    adapters: Directories,
    base: Base = None,
    system: Annotated[
        str | None, typer.Option(parser=text_of, metavar="TEXT", help="What the model is told beforehand.")
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Annotated[int | None, typer.Option(help="Of the draws. Default: another one each time.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk to adapters in the terminal: switch between them, or hear each beside its base. /help says how."""
    with uncollected():
        from rankwise.serve.chat import chat as talk
        from rankwise.serve.sampling import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    talk(adapters, base, system, sampling, terminal())
