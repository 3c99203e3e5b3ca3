"""What looking at an adapter takes: time for SmolLM2-135M and for a 7 B model's shapes, memory for one large layer.

python benchmarks/analyze.py
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import machine
from torch import nn

import rankwise as rw
from rankwise.adapter import Adapter, SiteAdapter
from rankwise.algebra.low_rank import LowRank
from rankwise.format.peft import read_adapter, write_adapter
from rankwise.report.measure import measure
from rankwise.train.model.pretrained import load_pretrained

RESULTS = Path(__file__).parent / "results" / "analyze.json"
# Llama-2-7B's linear layers.
SEVEN_B = {f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"} | {
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008),
}  # fmt: skip


def drawn(shape: tuple[int, int], rank: int, generator: torch.Generator) -> LowRank:
    out, into = shape
    return LowRank(torch.randn(out, rank, generator=generator) * 1e-3, torch.randn(rank, into, generator=generator))


def save_trained(directory: Path, rank: int) -> None:
    """An adapter of SmolLM2 that is not at its start."""
    model, _ = load_pretrained("smollm2-135m")
    rw.attach(model, rw.LoRA(rank=rank))
    with torch.no_grad():
        for pair in rw.pairs(model):
            pair.parameters[1].normal_(std=1e-3)
    rw.save(model, directory)


def command_seconds(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rankwise", "analyze", *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def peak_above(work) -> int:
    """Bytes by which the resident set grew at most while ``work`` ran, looked at every millisecond."""
    page, statm = os.sysconf("SC_PAGE_SIZE"), Path("/proc/self/statm")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(peak - before, 0)


def dense_layers(shape: tuple[int, int], *, intruders: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    adapter = Adapter(rw.LoRA(rank=16), {"0": SiteAdapter("linear", drawn(shape, 16, generator))}, ("0",))
    small = nn.Sequential(nn.Linear(64, 64, bias=False))
    warm = Adapter(rw.LoRA(rank=4), {"0": SiteAdapter("linear", drawn((64, 64), 4, generator))}, ("0",))
    measure(warm, small, intruders=intruders)  # what libraries allocate once is not the layer's
    return peak_above(lambda: measure(adapter, base, intruders=intruders)) / (shape[0] * shape[1] * 4)


def main() -> None:
    results = {"machine": machine()}
    with tempfile.TemporaryDirectory() as directory:
        small, large = Path(directory) / "small", Path(directory) / "large"
        save_trained(small, rank=16)
        page = str(Path(directory) / "page.html")
        results["SmolLM2-135M, rank 16, command"] = command_seconds(str(small), "--out", page)
        results["SmolLM2-135M, rank 16, command, intruders too"] = command_seconds(
            str(small), "--out", page, "--intruders"
        )
        model, _ = load_pretrained("smollm2-135m")
        adapter, began = read_adapter(small), time.perf_counter()
        measure(adapter, model)
        results["SmolLM2-135M, rank 16, measuring"] = time.perf_counter() - began
        generator = torch.Generator().manual_seed(0)
        sites = {
            f"model.layers.{layer}.{name}": SiteAdapter("linear", drawn(shape, 16, generator))
            for layer in range(32)
            for name, shape in SEVEN_B.items()
        }
        write_adapter(Adapter(rw.LoRA(rank=16), sites, tuple(n.rpartition(".")[2] for n in SEVEN_B)), large)
        results["Llama-2-7B's shapes, rank 16, command without the base"] = command_seconds(
            str(large), "--without-base", "--out", page
        )
    results["peak memory, in dense fp32 layers"] = {
        f"{shape[0]} × {shape[1]}{', intruders too' if intruders else ''}": dense_layers(shape, intruders=intruders)
        for intruders in (False, True)
        for shape in ((3072, 3072), (8192, 3072))
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
