"""`rankwise serve --engine vllm`: the same adapters, served by vLLM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankwise.errors import ServingError, UnsupportedAdapter
from rankwise.inspection.inspection import inspect
from rankwise.serve.options import ServerOptions

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM sets memory aside for


def vllm_command(
    model: str, base: str, adapters: Mapping[str, Path], ranks: Sequence[int], options: ServerOptions
) -> list[str]:
    """The command line of vLLM's server.

    Args:
        model: what vLLM is to load, a directory or a hub name.
        base: the name that it is served under.
        ranks: of the adapters' layers.

    >>> from rankwise.serve.options import ServerOptions
    >>> " ".join(vllm_command("/models/llama", "llama", {"french": Path("/a/french")}, [4, 12], ServerOptions()))
    ... # doctest: +NORMALIZE_WHITESPACE
    'vllm serve /models/llama --served-model-name llama --host 127.0.0.1 --port 8000 --max-num-seqs 32 --dtype auto
    --enable-lora --max-loras 1 --max-lora-rank 16 --lora-modules french=/a/french'
    """
    widest = max(ranks, default=_RANKS[0])
    rank = next((rank for rank in _RANKS if rank >= widest), widest)
    command = ["vllm", "serve", model, "--served-model-name", base, "--host", options.host, "--port", str(options.port)]
    command += ["--max-num-seqs", str(options.max_batch), "--dtype", options.dtype]
    if options.max_length is not None:
        command += ["--max-model-len", str(options.max_length)]
    command += ["--enable-lora", "--max-loras", str(max(1, min(options.max_adapters, len(adapters))))]
    command += ["--max-lora-rank", str(rank)]
    if adapters:
        command += ["--lora-modules", *(f"{name}={directory}" for name, directory in adapters.items())]
    return command


def vllm_environment(options: ServerOptions) -> dict[str, str]:
    """What vLLM is told by its environment: the key, which a command line would show, and whether it may load more.

    vLLM loads at run time from any directory or from none.
    """
    return {
        **({} if options.api_key is None else {"VLLM_API_KEY": options.api_key}),
        **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if options.load_from_anywhere else {}),
    }


def run_vllm(model: str, base: str, adapters: Mapping[str, Path], options: ServerOptions) -> None:
    """Become vLLM's server.

    Raises:
        ServingError: vLLM is not installed. UnsupportedAdapter: it does not read one of the adapters right.
    """
    ranks = [rank for directory in adapters.values() for rank in _ranks(directory)]
    if shutil.which("vllm") is None:
        raise ServingError(
            "--engine vllm: expected the command vllm, found none on the PATH. Install it in an environment of its own "
            "(python -m venv vllm && vllm/bin/pip install vllm), activate that beside this one, or leave --engine out"
        )
    command = vllm_command(model, base, adapters, ranks, options)
    os.execvpe(command[0], command, {**os.environ, **vllm_environment(options)})


def _ranks(directory: Path) -> list[int]:
    inspection = inspect(directory)
    verdict = next((verdict for verdict in inspection.engines if verdict.engine == "vLLM"), None)
    if verdict is None or verdict.answer != "yes":
        why = verdict.reason if verdict else "; ".join(inspection.problems[:1])
        raise UnsupportedAdapter(f"{directory}: vLLM does not read this adapter right as it stands: {why}")
    return [site.rank for site in inspection.sites]
