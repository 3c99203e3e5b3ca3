"""`rankwise serve`: from a base model and directories to a server that runs until it is told to stop."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from rich.console import Console

from rankwise.errors import RankwiseError, ServingError
from rankwise.serve.adapter_store import AdapterStore, check_directory, directory_of, named_directories
from rankwise.serve.api import Service, make_app
from rankwise.serve.batch import check_generates
from rankwise.serve.engine import Engine
from rankwise.serve.metrics import Metrics
from rankwise.serve.options import ServerOptions
from rankwise.serve.prompts import Limits, length_limit
from rankwise.serve.vllm import run_vllm
from rankwise.train.model.busy import busy
from rankwise.train.model.pretrained import load_pretrained, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def serve(base: str, adapters: Sequence[str], options: ServerOptions, console: Console, *, engine: str) -> None:
    """Serve a base model and adapters until SIGTERM or Ctrl-C; answers under way are finished then.

    Args:
        adapters: as :func:`rankwise.serve.adapter_store.named_directories` takes them. One that is broken, another
            base's or too large is named and left out.
        engine: "rankwise" or "vllm".

    Raises:
        ServingError: the address is taken, or vLLM is not installed. RequestError: an argument names nothing.
        PretrainedError: no such base, or one that is not served here.
    """
    named = dict(named_directories(adapters))
    if engine == "vllm":
        run_vllm(str(locate(base)), base, named, options)
    listening = listen(options.host, options.port)  # before minutes are spent on a model
    with listening:
        with busy(console, f"Loading {base}"):
            model, tokenizer = load_pretrained(base, dtype=options.dtype)
        service = make_service(model, tokenizer, base, options, [directory_of(adapter)[1] for adapter in adapters])
        add_adapters(service, named, console)
        host, port = listening.getsockname()[:2]
        console.print(f"Serving on http://{f'[{host}]' if ':' in host else host}:{port} until Ctrl-C", highlight=False)
        if options.api_key is None and not ipaddress.ip_address(host).is_loopback:
            console.print("Anybody who reaches this address may use it: set --api-key", style="yellow")
        config = uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=options.grace)
        uvicorn.Server(config).run(sockets=[listening])


def make_service(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    options: ServerOptions,
    roots: Sequence[Path] = (),
) -> Service:
    """A running engine for a model, and what the API needs beside it.

    Args:
        roots: the directories that adapters may be loaded from at run time.

    Raises:
        PretrainedError, RequestError: the model, or a limit, does not allow it.
    """
    check_generates(model)
    length = length_limit(model, options.max_length)
    limits = Limits(length, min(options.max_tokens, length - 1), options.max_batch, options.max_body)
    memory = int(options.adapter_memory * 2**30)
    store = AdapterStore(model, base, max_count=options.max_adapters, max_bytes=memory)
    metrics = Metrics(base)
    engine = Engine(
        model, tokenizer, store, max_batch=options.max_batch, max_waiting=options.max_waiting, meter=metrics
    )
    metrics.watch(engine)
    return Service(engine, metrics, limits, options.api_key, None if options.load_from_anywhere else tuple(roots))


def add_adapters(service: Service, adapters: Mapping[str, Path], console: Console) -> None:
    """Serve those adapters that are sound and fit the base, and say of each whether it is."""
    engine = service.engine
    for name, directory in adapters.items():
        try:
            check_directory(directory)
            engine.call(partial(engine.store.add, name, directory)).result()
        except RankwiseError as error:
            console.print(f"refused {name}: {type(error).__name__}: {error}", style="red", highlight=False)
        else:
            size = engine.store.adapters[name].size
            console.print(f"adapter {name}: {directory}, {size / 2**20:.1f} MiB", highlight=False)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address.

    Raises:
        ServingError: it is taken, or none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ServingError(
            f"--host {host} --port {port}: expected an address of this machine that is free, found: {error}. Choose "
            f"another --port (0: any), or stop what listens there"
        ) from None
