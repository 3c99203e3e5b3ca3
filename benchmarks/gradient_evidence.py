"""Sketched gradients beside exact ones: what they capture, store, cost and hold in memory. SmolLM2-135M, r = 8.

    python benchmarks/gradient_evidence.py [--batches 8] [--threads 1] [--parts quality cost memory update]

Quality: the share of ‖G‖² that LoRA-GA's pair captures, over that of the exact gradient's singular vectors, a layer.
Cost: LoRA-GA's start on the same batches, beside PEFT's `preprocess_loraga` + `get_peft_model`.
Memory: peak resident size above that of the loaded model, each in a process of its own.
Update: one layer's sketch update beside the weight-gradient product dYᵀX that it stands for.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from common import MODEL, RESULTS, batches, interleaved, machine, ratio, seconds, write
from torch import Tensor

import rankwise as rw
from rankwise.evidence.sketch import _Running
from rankwise.layers.increments import Outer
from rankwise.train.model.pretrained import load_pretrained

RANK = 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Triplets = tuple[Tensor, Tensor, Tensor]


def captured(G: Tensor, triplets: Triplets) -> float:
    """‖G‖² − ‖(I − BBᵀ)G(I − AᵀA)‖² for LoRA-GA's A = V[:, :r]ᵀ, B = U[:, r:2r]."""
    u, _, v = triplets
    left, right = u[:, RANK : 2 * RANK].T @ G, G @ v[:, :RANK]
    both = left @ v[:, :RANK]
    return float(left.double().square().sum() + right.double().square().sum() - both.double().square().sum())


class PlainSketch:
    """One pass with fixed random matrices: G ≈ Q (ΨᵀQ)⁺ ΨᵀG, Q = orth(GΩ) (Tropp 2017, "Practical sketching")."""

    def __init__(self, out: int, into: int, width: int, seed: int) -> None:
        # As many numbers as a factor of `width` directions: columns of Ω and Ψ in the recommended ratio 1 : 2.
        self.narrow = width * (out + into) // (out + 2 * into)
        generator = torch.Generator().manual_seed(seed)
        self.omega = torch.randn(into, self.narrow, generator=generator)
        self.psi = torch.randn(out, 2 * self.narrow + 1, generator=generator)

    def svd(self, G: Tensor) -> Triplets:
        Q = torch.linalg.qr(G @ self.omega).Q
        core = torch.linalg.lstsq(self.psi.T @ Q, self.psi.T @ G).solution
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        return Q @ u, s, vh.T


def quality(count: int) -> dict[str, Any]:
    model, _ = load_pretrained(MODEL)
    data = batches(count, full=True)
    exact = rw.gradients(model, data)
    one, two = (rw.gradients(model, data, method="sketch", rank=RANK, passes=passes) for passes in (1, 2))
    wide = rw.gradients(model, data, method="sketch", rank=RANK, oversample=8)
    shares: dict[str, list[float]] = {}
    errors = []
    for number, (name, truth) in enumerate(exact.items()):
        G = truth.matrix
        best = captured(G, truth.svd(2 * RANK))
        contenders: dict[str, Triplets] = {
            "running factor, k = 4r, one pass": one[name].svd(2 * RANK),
            "running factor, k = 4r, two passes": two[name].svd(2 * RANK),
            "running factor, k = 8r, one pass": wide[name].svd(2 * RANK),
            "plain one-pass sketch, as many numbers as k = 4r": PlainSketch(*G.shape, 4 * RANK, number).svd(G),
            "svd_lowrank of the exact gradient": torch.svd_lowrank(G, 2 * RANK + 10, niter=2),
        }
        for label, triplets in contenders.items():
            shares.setdefault(label, []).append(captured(G, triplets) / best)
        truly = 1 - float((G - (one[name].U * one[name].S) @ one[name].V.T).square().sum()) / truth.energy
        errors.append(abs(one[name].captured - truly))
    stored = sum(each.U.numel() + each.S.numel() + each.V.numel() for each in one.values())
    probes = sum(8 * sum(each.matrix.shape) for each in exact.values())
    return {
        "share of the optimum": {
            label: {"mean": round(statistics.fmean(v), 5), "worst layer": round(min(v), 5)}
            for label, v in shares.items()
        },
        "share of the gradient's energy that the optimum captures, mean": round(
            statistics.fmean(captured(e.matrix, e.svd(2 * RANK)) / e.energy for e in exact.values()), 4
        ),
        "largest error of the estimated captured share": round(max(errors), 4),
        "layers": len(exact),
        "numbers stored / exact gradients'": {
            "factor": round(stored / sum(e.matrix.numel() for e in exact.values()), 4),
            "factor and probes": round((stored + probes) / sum(e.matrix.numel() for e in exact.values()), 4),
        },
    }


def start_with_peft(model: Any, data: list[dict[str, Tensor]]) -> None:
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=16,
        target_modules=PROJECTIONS,  # which LoRA-GA there wants by name
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )

    def train_step() -> None:
        for batch in data:
            model(**batch).loss.backward()

    peft.preprocess_loraga(model, config, train_step)
    peft.get_peft_model(model, config)


def start_with_ours(method: str) -> Callable[[Any, list[dict[str, Tensor]]], None]:
    def start(model: Any, data: list[dict[str, Tensor]]) -> None:
        rw.attach(model, rw.LoRA(rank=RANK, init="lora-ga", scaling="rslora"), batches=data, method=method)

    return start


def training_step(model: Any, data: list[dict[str, Tensor]]) -> None:
    rw.attach(model, rw.LoRA(rank=RANK)).train()
    optimizer = torch.optim.AdamW(rw.trainable_parameters(model))
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def floor(model: Any, data: list[dict[str, Tensor]]) -> None:
    """Forward, and backward to the input embeddings: what no way of seeing the gradients does without."""
    model.requires_grad_(False)
    for batch in data:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        model(inputs_embeds=embeddings, **rest).loss.backward()


STARTS = {
    "floor": floor,
    "sketch": start_with_ours("sketch"),
    "exact": start_with_ours("exact"),
    "peft": start_with_peft,
    "training": training_step,
}


def cost(count: int, rounds: int = 2) -> dict[str, Any]:
    """Seconds of a whole start, in turn, each on a fresh model; the model's loading is not counted."""
    data = batches(count, full=True)
    times: dict[str, list[float]] = {"floor": [], "sketch": [], "exact": [], "peft": []}
    for _ in range(rounds):
        for name, found in times.items():
            model = load_pretrained(MODEL)[0].train(name == "peft")
            began = time.process_time()
            STARTS[name](model, data)
            found.append(time.process_time() - began)
            print(name, found[-1], flush=True)
    return {
        "seconds": {name: seconds(found) for name, found in times.items()},
        "sketch / peft": ratio(times["sketch"], times["peft"]),
        "floor / peft": ratio(times["floor"], times["peft"]),
        "exact / peft": ratio(times["exact"], times["peft"]),
    }


def _status(field: str) -> int:
    """Bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


def peak(name: str, count: int) -> int:
    """Bytes above the loaded model's that a start takes at its peak, in this process."""
    model = load_pretrained(MODEL)[0]
    data = batches(count, full=True)
    with torch.no_grad():
        model(**data[0])  # libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    STARTS[name](model, data)
    return _status("VmHWM") - before


def memory(count: int) -> dict[str, Any]:
    found = {}
    for name in STARTS:
        command = [sys.executable, __file__, "--peak", name, "--batches", str(count), "--threads", "1"]
        # Freed blocks go back to the system at once; else what glibc keeps in fragments is measured.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        found[name] = int(output.splitlines()[-1]) / 2**20
        print(name, found[name], flush=True)
    return {
        "MiB above the model": {name: round(value, 1) for name, value in found.items()},
        "sketch / training step": round(found["sketch"] / found["training"], 3),
        "sketch / peft": round(found["sketch"] / found["peft"], 3),
    }


def update(rounds: int = 15) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for size in (576, 2048, 4096):
        x, grad_y = torch.randn(512, size), torch.randn(512, size)
        running = _Running((size, size), 4 * RANK, torch.Generator().manual_seed(0), x.device)
        running.add(Outer(x, grad_y))  # the first one has no V to go on from
        contenders = {
            "sketch update": lambda: running.add(Outer(x, grad_y)),  # noqa: B023
            "weight gradient": lambda: grad_y.T @ x,  # noqa: B023
        }
        times = interleaved(contenders, rounds, warmup=3, clock=time.process_time)
        result[f"{size} × {size}, 512 tokens"] = {
            "seconds": {name: seconds(found) for name, found in times.items()},
            "update / product": ratio(times["sketch update"], times["weight gradient"]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["quality", "cost", "memory", "update"])
    parser.add_argument("--peak", choices=STARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak, options.batches))
        return
    path = RESULTS / "gradient_evidence.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result |= {"what": __doc__, "machine": machine(), "rank": RANK}
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "quality": lambda: quality(options.batches),
        "cost": lambda: cost(options.batches),
        "memory": lambda: memory(options.batches),
        "update": update,
    }
    for part in options.parts:
        result[part] = runs[part]()
        print(part, json.dumps(result[part], indent=2, ensure_ascii=False), flush=True)
        write("gradient_evidence", result)


if __name__ == "__main__":
    main()
