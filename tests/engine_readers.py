"""What other engines compute with an exported adapter: PEFT, mlx-lm, and llama.cpp where it was built."""

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

# `make engines` builds it there.
LLAMA_CPP = Path(os.environ.get("RANKWISE_LLAMA_CPP", Path(__file__).parents[1] / "build/engines/llama.cpp"))
SERVER = LLAMA_CPP / "build" / "bin" / "llama-server"
WITHOUT_SERVER = f"no {SERVER}: run `make engines`, or name llama.cpp's directory in RANKWISE_LLAMA_CPP"


def peft_logits(base: Path, adapter: Path | None, ids: list[int]) -> Tensor:
    """[tokens, vocabulary] of a transformers directory with a PEFT adapter on it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    return logits


def mlx_logits(base: Path, adapter: Path | None, ids: list[int]) -> Tensor:
    """The same, by mlx-lm; without a tokenizer, which it would want from the directory."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    rope = json.loads((base / "config.json").read_text()).get("rope_parameters", {})
    # mlx-lm's llama does not read transformers 5's rope_parameters.
    model, _ = load_model(
        base, model_config={key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    )
    if adapter is not None:
        model = load_adapters(model, str(adapter))
    logits = model.eval()(mx.array([ids]))[0].astype(mx.float32)
    return torch.from_numpy(np.array(logits))


@contextmanager
def llama_server(model: Path, adapter: Path | None) -> Iterator["LlamaServer"]:
    """llama.cpp's server with a GGUF model, and a GGUF adapter on it; all in fp32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(SERVER), "--model", str(model), "--port", str(port), "--ctx-size", "256", "--threads", "1"]
    command += [
        "--cache-type-k",
        "f32",
        "--cache-type-v",
        "f32",
        "--flash-attn",
        "off",
        "--parallel",
        "1",
        "--no-webui",
    ]
    command += ["--lora", str(adapter)] if adapter is not None else []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            yield LlamaServer(process, said, f"http://127.0.0.1:{port}")
        finally:
            process.kill()
            process.wait()


class LlamaServer:
    """A running server."""

    def __init__(self, process: "subprocess.Popen[bytes]", said: IO[str], url: str) -> None:
        self.url = url
        for _ in range(1200):
            if process.poll() is not None:
                said.seek(0)
                raise RuntimeError(said.read()[-2000:])
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return
            except urllib.error.HTTPError as loading:
                loading.close()
                time.sleep(0.1)
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise RuntimeError("llama-server does not answer")

    def log_probabilities(self, ids: list[int], vocabulary: int) -> Tensor:
        """[vocabulary] of the next token."""
        answer = self._complete(ids, n_predict=1, n_probs=vocabulary)
        rows = answer["completion_probabilities"][0]["top_logprobs"]
        result = torch.full((vocabulary,), -torch.inf)
        for row in rows:
            result[row["id"]] = row["logprob"]
        return result

    def greedy(self, ids: list[int], count: int) -> str:
        """What it says next."""
        text: str = self._complete(ids, n_predict=count)["content"]
        return text

    def _complete(self, ids: list[int], **options: Any) -> Any:
        wanted = {"prompt": ids, "temperature": 0.0, "cache_prompt": False, "top_k": 0, **options}
        request = urllib.request.Request(
            f"{self.url}/completion", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
