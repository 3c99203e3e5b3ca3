"""Train wide, ship narrow: rank 64 in the wind tunnel, squeezed to 8 and 4 before its last 0, 4 or 8 steps.

All runs are of 80 steps, LoRA with AdamW (betas 0.8 and 0.99), at the rate that is best for rank 64. What is lost is
counted in the weights, or in the layers' outputs on the next 8 training batches. One run of rank 64 forks at each of
the three places, so that all of a seed's figures share it.

    python benchmarks/squeezing.py
"""

import argparse
import json
from copy import deepcopy
from itertools import product
from typing import Any

import common
import torch
from torch import Tensor, nn
from wind_tunnel import BATCH, METHODS, STEPS, Tunnel, descend, windows

import rankwise as rw
from rankwise.reshaping import narrow

METHOD = "lora, betas 0.8 0.99"
WIDE, RANKS, REPAIRS = 64, (8, 4), (0, 4, 8)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, window: Tensor, number: int) -> None:
    descend(model, optimizer, window, 1 - number / STEPS)
    optimizer.zero_grad()


def outputs(model: nn.Module, window: Tensor) -> Tensor:
    logits: Tensor = model(window[:, :-1])
    return logits


def shipped(
    tunnel: Tunnel, wide: nn.Module, generator: torch.Generator, rate: float, rank: int, repair: int, *, weighted: bool
) -> dict[str, Any]:
    """The wide model squeezed with ``repair`` steps to go, and trained on for them."""
    model, same = deepcopy(wide), torch.Generator()
    same.set_state(generator.get_state())
    inputs = rw.covariances(model, tunnel.batches_to_come(same), forward=outputs) if weighted else None
    squeezed = narrow(model, rank, inputs=inputs)
    after = tunnel.judged(model)
    optimizer = METHODS[METHOD].optimizer(model, rate)
    for number in range(STEPS - repair, STEPS):
        step(model, optimizer, windows(tunnel.texts["train"], BATCH, same), number)
    facts = {"rank": rank, "repair": repair, "weighted": weighted, "error": round(squeezed.error, 4)}
    return {**facts, "squeezed": after, "repaired": tunnel.judged(model) if repair else after}


def run(tunnel: Tunnel, rate: float, seed: int) -> dict[str, Any]:
    model, generator = tunnel.started(METHODS[METHOD], WIDE, seed)
    optimizer = METHODS[METHOD].optimizer(model, rate)
    forks = []
    for number in range(STEPS + 1):
        if STEPS - number in REPAIRS:
            wide = tunnel.judged(model)
            for rank, weighted in product(RANKS, (False, True)):
                fork = shipped(tunnel, model, generator, rate, rank, STEPS - number, weighted=weighted)
                forks.append({"wide": wide, **fork})
                print(json.dumps({"seed": seed, **forks[-1]}), flush=True)
        if number < STEPS:
            step(model, optimizer, windows(tunnel.texts["train"], BATCH, generator), number)
    return {"seed": seed, "rate": rate, "wide": tunnel.judged(model), "shipped": forks}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    tunnel = Tunnel()
    rate = tunnel.best_rate(METHOD, METHODS[METHOD], WIDE)
    runs = []
    for seed in (0, 1, 2):
        runs.append(run(tunnel, rate, seed))
        common.write("squeezing", {"machine": common.machine(), "method": METHOD, "rank": WIDE, "runs": runs})


if __name__ == "__main__":
    main()
