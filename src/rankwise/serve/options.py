"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerOptions:
    """How to serve.

    Attributes:
        host, port: where to listen; port 0: any that is free.
        api_key: which requests to ``/v1`` must bring; None: none.
        dtype: of the base model, as transformers takes it.
        max_batch: answers under way together.
        max_waiting: requests that may wait for their turn.
        max_adapters, adapter_memory: adapters in memory, and GiB that they may take.
        max_length: tokens of a prompt and its answer; None: 4096, or what the model knows.
        max_tokens: tokens of an answer.
        max_body: bytes of a request.
        load_from_anywhere: let ``/v1/load_lora_adapter`` read any directory.
        grace: seconds for which answers under way may go on after SIGTERM or Ctrl-C.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    dtype: str = "auto"
    max_batch: int = 32
    max_waiting: int = 256
    max_adapters: int = 32
    adapter_memory: float = 4.0
    max_length: int | None = None
    max_tokens: int = 1024
    max_body: int = 2**20
    load_from_anywhere: bool = False
    grace: int = 30
