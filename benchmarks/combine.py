"""Combining two adapters of a 7 B model's shapes: time on one thread, and peak memory of the whole process.

    python benchmarks/combine.py

All linear layers of Llama-2-7B, two adapters of rank 16 in fp32 with random factors. Every method runs in a process of
its own, whose peak memory holds both adapters and the result; the clock is that process's CPU time. TIES and DARE go
through the entries of ΔW, 6.5 · 10⁹ in all: they are timed on one layer of the 32.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from common import machine, write

import rankwise as rw
from rankwise.adapter import Adapter, SiteAdapter

LAYERS, RANK = 32, 16
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "exact": ("exact", {}, LAYERS),
    "svd, rank 16": ("svd", {"rank": 16}, LAYERS),
    "svd, error 0.2": ("svd", {"error": 0.2}, LAYERS),
    "knots, rank 16": ("knots", {"rank": 16}, LAYERS),
    "ties, rank 16, one layer": ("ties", {"rank": 16}, 1),
    "dare, rank 16, one layer": ("dare", {"rank": 16}, 1),
}


def adapter(seed: int, layers: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for layer in range(layers):
        for name, (out, into) in SHAPES.items():
            B = torch.randn(out, RANK, generator=generator)
            A = torch.randn(RANK, into, generator=generator)
            sites[f"model.layers.{layer}.{name}"] = SiteAdapter("linear", rw.LowRank(B, A, 2.0))
    return Adapter(rw.LoRA(rank=RANK), sites, tuple(name.rpartition(".")[2] for name in SHAPES))


def measured(case: str) -> dict[str, float]:
    torch.set_num_threads(1)
    method, limit, layers = CASES[case]
    parts = [(adapter(seed, layers), 0.5) for seed in (1, 2)]
    start = time.process_time()
    combined = rw.algebra.combine(parts, method, **limit)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(seconds, 2), "peak MiB": round(peak), "error": round(combined.error, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case")
    case = parser.parse_args().case
    if case:
        print(json.dumps(measured(case)))
        return
    results = {}
    for name in CASES:
        run = subprocess.run([sys.executable, __file__, "--case", name], capture_output=True, text=True, check=True)
        results[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, results[name])
    torch.set_num_threads(1)
    write("combine", {"shapes": "Llama-2-7B", "adapters": 2, "rank": RANK, "methods": results, "machine": machine()})


if __name__ == "__main__":
    main()
