"""How far the first step of each start agrees with full fine-tuning's, on every linear layer of SmolLM2-135M, r = 8.

    python benchmarks/first_step.py [--batches 8] [--threads 2]

The gradient is that of 8 batches of 4 × 128 tokens of the built-in data set. Cosines between the adapter's first step
and full fine-tuning's, for SGD and for Adam (sign of the gradient).
"""

import argparse
import statistics
import time
from typing import Any

import torch
from common import MODEL, batches, machine, write

import rankwise as rw
from rankwise.analysis.alignment import alignment
from rankwise.train.model.pretrained import load_pretrained

STARTS = {
    "kaiming": "kaiming",
    "pissa": "pissa",
    "lora-ga, align=sgd": rw.inits.LoraGA(),
    "lora-ga, align=sign": rw.inits.LoraGA(align="sign"),
    "lora-ga, align=adam": rw.inits.LoraGA(align="adam"),
}


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(statistics.fmean(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, _ = load_pretrained(MODEL)
    began = time.perf_counter()
    gradients = rw.gradients(model, batches(options.batches, full=True))
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "rank": 8, "layers": len(gradients)}
    result["seconds to collect the gradients"] = round(time.perf_counter() - began, 1)
    result["starts"] = {}
    for name, init in STARTS.items():
        began = time.perf_counter()
        rw.attach(model, rw.LoRA(init=init, scaling="rslora"), evidence=gradients)
        took = time.perf_counter() - began
        row: dict[str, Any] = {"seconds to attach": round(took, 1)}
        for optimizer in ("sgd", "adamw"):
            found = {p.name: alignment(gradients[p.name].matrix, p.A, p.B, p.scale, optimizer) for p in rw.pairs(model)}
            row[optimizer] = spread([a.cosine for a in found.values()])
            kinds = sorted({site.rpartition(".")[2] for site in found})
            row[optimizer]["by module"] = {
                kind: round(statistics.fmean(a.cosine for site, a in found.items() if site.endswith(kind)), 4)
                for kind in kinds
            }
        rw.detach(model)
        result["starts"][name] = row
        print(name, row, flush=True)
    write("first_step_alignment", result)


if __name__ == "__main__":
    main()
