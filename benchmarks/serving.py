"""A server under load: 64 streams of OpenAI's own client over 16 adapters, for minutes, with faults in between.

    python benchmarks/serving.py [--seconds 600] [--streams 64] [--threads 1]

SmolLM2-135M in fp32 with 16 adapters of rank 8 on all linear layers (random weights; `distinct_answers` of the 20
offline answers differ), served by `rankwise serve` in a process of its own. Each stream asks one of the adapters to go
on with a text, again and again, greedily, and compares the answer with what transformers' `generate` said offline, of
that prompt alone, with that adapter alone. Meanwhile four other adapters are loaded, asked, compared and unloaded; and
every few seconds there comes a malformed request, an oversized prompt, an unknown model, a broken adapter, and a client
that vanishes. In the end no row may be left, and the memory of adapters must be what it was.

`smallest_gap` is the least that the likeliest token of any offline answer was ahead of the second, in logits: rows of a
batch are summed in another order, which moves logits by some 1e-5, so that a tie closer than that could fall otherwise.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from common import MODEL, machine, write
from openai import APIStatusError, AsyncOpenAI

import rankwise as rw

ADAPTERS, CHURNED, TOKENS = 16, 4, 12
PROMPTS = (
    "The keeper of the lighthouse found a letter",
    "In the kitchen there are",
    "The sky is blue by day and red in the evening, because the light of the sun",
)


def make_adapters(model: Any, folder: Path) -> None:
    for number in range(ADAPTERS + CHURNED):
        generator = torch.Generator().manual_seed(number)
        rw.attach(model, rw.LoRA(rank=8, target_modules="all-linear", seed=number))
        with torch.no_grad():
            for pair in rw.pairs(model):
                for parameter in pair.parameters[1:]:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        kind = "adapters" if number < ADAPTERS else "others"
        rw.save(model, folder / kind / f"adapter{number}")
        rw.detach(model)
    broken = folder / "others" / "broken"
    broken.mkdir()
    for file in (folder / "adapters/adapter0").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:-8])


def prompt_of(name: str) -> str:
    return PROMPTS[int(name.removeprefix("adapter")) % len(PROMPTS)]


@torch.no_grad()
def offline(model: Any, tokenizer: Any, folder: Path) -> tuple[dict[str, str], float]:
    """Adapter → greedy answer to its prompt; and the smallest gap between the likeliest two tokens."""
    answers: dict[str, str] = {}
    smallest = torch.inf
    for path in sorted([*folder.glob("adapters/*"), *folder.glob("others/adapter*")]):
        rw.load(model, path)
        inputs = tokenizer(prompt_of(path.name), return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        written = output.sequences[0, inputs["input_ids"].shape[1] :]
        answers[path.name] = tokenizer.decode(written, skip_special_tokens=True)
        for logits in output.logits:
            first, second = logits[0].topk(2).values.tolist()
            smallest = min(smallest, first - second)
        rw.detach(model)
    return answers, smallest


def start_server(folder: Path, streams: int, threads: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "rankwise", "serve", MODEL, "--adapters", str(folder / "adapters"), "--port", "0"]
    command += ["--dtype", "float32", "--max-batch", str(streams), "--max-adapters", str(ADAPTERS + CHURNED)]
    command += ["--max-length", "512", "--load-from-anywhere"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "300", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    for line in server.stdout:
        if address := re.search(r"http://\S+", line):
            return server, address.group()
    raise RuntimeError("the server did not start")


def metric(address: str, name: str) -> float:
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def resident(server: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


class Load:
    """What the clients do, and what they saw."""

    def __init__(self, address: str, answers: dict[str, str], folder: Path, seconds: float) -> None:
        self.client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
        self.answers, self.folder, self.end = answers, folder, time.monotonic() + seconds
        self.first: list[float] = []
        self.total: list[float] = []
        self.tokens = 0
        self.wrong: list[dict[str, str]] = []
        self.counts = dict.fromkeys(("churned", "malformed", "oversized", "unknown", "broken", "vanished"), 0)
        self.unexpected: list[str] = []

    async def ask(self, name: str) -> None:
        began = time.monotonic()
        text, first, tokens = "", 0.0, 0
        stream = await self.client.completions.create(
            model=name, prompt=prompt_of(name), max_tokens=TOKENS, temperature=0, stream=True
        )
        async for chunk in stream:
            first = first or time.monotonic() - began
            text += chunk.choices[0].text
            tokens += 1
        self.first.append(first)
        self.total.append(time.monotonic() - began)
        self.tokens += tokens
        if text != self.answers[name]:
            self.wrong.append({"adapter": name, "served": text, "offline": self.answers[name]})

    async def stream(self, number: int) -> None:
        draws = random.Random(number)
        while time.monotonic() < self.end:
            await self.ask(f"adapter{draws.randrange(ADAPTERS)}")

    async def churn(self) -> None:
        """Load an adapter, ask it, unload it while it is asked again, and so on."""
        number = 0
        while time.monotonic() < self.end:
            name = f"adapter{ADAPTERS + number % CHURNED}"
            body = {"lora_name": name, "lora_path": str(self.folder / "others" / name)}
            await self.client.post("/load_lora_adapter", body=body, cast_to=str)
            await self.ask(name)
            last = asyncio.create_task(self.ask(name))
            await asyncio.sleep(0.5)
            await self.client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=str)
            await last
            number += 1
            self.counts["churned"] += 1

    async def fault(self, kind: str, status: int, code: str, path: str, body: dict[str, Any]) -> None:
        try:
            await self.client.post(path, body=body, cast_to=str)
        except APIStatusError as error:
            if (error.status_code, error.code) == (status, code):
                self.counts[kind] += 1
                return
            self.unexpected.append(f"{kind}: {error}")
        else:
            self.unexpected.append(f"{kind}: was answered")

    async def faults(self) -> None:
        asked = {"model": "adapter0", "messages": [{"role": "user", "content": PROMPTS[0]}]}
        long = [{"role": "user", "content": "word " * 600}]
        broken = {"lora_name": "broken", "lora_path": str(self.folder / "others" / "broken")}
        while time.monotonic() < self.end:
            chat = "/chat/completions"
            await self.fault("malformed", 400, "RequestError", chat, asked | {"temperature": "hot"})
            await self.fault("oversized", 400, "RequestError", chat, asked | {"messages": long})
            await self.fault("unknown", 404, "model_not_found", chat, asked | {"model": "adapter99"})
            await self.fault("broken", 400, "CheckpointError", "/load_lora_adapter", broken)
            stream = await self.client.completions.create(
                model="adapter0", prompt=PROMPTS[0], max_tokens=200, stream=True
            )
            await anext(aiter(stream))
            await stream.close()
            self.counts["vanished"] += 1
            await asyncio.sleep(4)

    async def run(self, streams: int) -> None:
        await asyncio.gather(*(self.stream(number) for number in range(streams)), self.churn(), self.faults())


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from rankwise.train.model.pretrained import load_pretrained

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, tokenizer = load_pretrained(MODEL, dtype="float32")
        make_adapters(model.eval(), folder)
        answers, gap = offline(model, tokenizer, folder)
        del model
        server, address = start_server(folder, options.streams, options.threads)
        try:
            load = Load(address, answers, folder, 5)
            asyncio.run(load.run(options.streams))  # warm up
            time.sleep(3)  # until the last one that vanished is let go
            before = {"loaded": metric(address, "rankwise_adapter_loaded_bytes"), "resident": resident(server)}
            load = Load(address, answers, folder, options.seconds)
            began = time.monotonic()
            asyncio.run(load.run(options.streams))
            seconds = time.monotonic() - began
            time.sleep(3)
            left = {name: metric(address, f"rankwise_requests_{name}") for name in ("running", "waiting")}
            after = {"loaded": metric(address, "rankwise_adapter_loaded_bytes"), "resident": resident(server)}
        finally:
            server.send_signal(signal.SIGTERM)
            stopped = server.wait(60)
    result = {
        "what": __doc__,
        "machine": machine() | {"load_average": os.getloadavg()[1]},
        "streams": options.streams,
        "adapters": ADAPTERS,
        "seconds": round(seconds, 1),
        "answers": len(load.total),
        "wrong": load.wrong,
        "distinct_answers": len(set(answers.values())),
        "smallest_gap": gap,
        "tokens_per_second": round(load.tokens / seconds, 1),
        "seconds_to_first_token": percentiles(load.first),
        "seconds_to_last_token": percentiles(load.total),
        "faults": load.counts,
        "unexpected": load.unexpected,
        "rows_left": left,
        "memory": {"before": before, "after": after},
        "exit_status": stopped,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "what"}, indent=2))
    write("serving", result)


if __name__ == "__main__":
    main()
