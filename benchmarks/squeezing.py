"""Train wide, ship narrow: rank 64 in the wind tunnel, squeezed to 8 and 4 before its last 0, 4 or 8 steps.

All runs are of 80 steps, LoRA with AdamW (betas 0.8 and 0.99), at the rate that is best for rank 64. What is lost is
counted in the weights, or in the layers' outputs on the next 8 training batches. The steps after squeezing have the
rates of the schedule's tail, or begin at a share of the peak that falls to zero over them. One run of rank 64 forks at
each of the three places, so that all of a seed's figures share it.

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
TAIL, OWN = "tail", "own"
OWN_PEAK = 0.8
FORKS = ((False, TAIL), (True, TAIL), (False, OWN))  # whether outputs are what is lost, and the repair's rates


def step(model: nn.Module, optimizer: torch.optim.Optimizer, window: Tensor, share: float) -> None:
    descend(model, optimizer, window, share)
    optimizer.zero_grad()


def tail(number: int) -> float:
    """The share of the peak that step ``number`` has in the whole run's schedule."""
    return 1 - number / STEPS


def own(number: int, repair: int) -> float:
    """The share in a schedule of the last ``repair`` steps alone: from OWN_PEAK to zero."""
    return OWN_PEAK * (STEPS - number) / repair


def outputs(model: nn.Module, window: Tensor) -> Tensor:
    logits: Tensor = model(window[:, :-1])
    return logits


def shipped(
    tunnel: Tunnel,
    wide: nn.Module,
    generator: torch.Generator,
    rate: float,
    rank: int,
    repair: int,
    *,
    weighted: bool,
    schedule: str,
) -> dict[str, Any]:
    """The wide model squeezed with ``repair`` steps to go, and trained on for them."""
    model, same = deepcopy(wide), torch.Generator()
    same.set_state(generator.get_state())
    inputs = rw.covariances(model, tunnel.batches_to_come(same), forward=outputs) if weighted else None
    squeezed = narrow(model, rank, inputs=inputs)
    after = tunnel.judged(model)
    optimizer = METHODS[METHOD].optimizer(model, rate)
    for number in range(STEPS - repair, STEPS):
        share = tail(number) if schedule == TAIL else own(number, repair)
        step(model, optimizer, windows(tunnel.texts["train"], BATCH, same), share)
    facts = {"rank": rank, "repair": repair, "weighted": weighted, "schedule": schedule}
    facts["error"] = round(squeezed.error, 4)
    return {**facts, "squeezed": after, "repaired": tunnel.judged(model) if repair else after}


def run(tunnel: Tunnel, rate: float, seed: int) -> dict[str, Any]:
    model, generator = tunnel.started(METHODS[METHOD], WIDE, seed)
    optimizer = METHODS[METHOD].optimizer(model, rate)
    forks = []
    for number in range(STEPS + 1):
        if STEPS - number in REPAIRS:
            wide = tunnel.judged(model)
            for rank, (weighted, schedule) in product(RANKS, FORKS if number < STEPS else FORKS[:2]):
                options = {"weighted": weighted, "schedule": schedule}
                fork = shipped(tunnel, model, generator, rate, rank, STEPS - number, **options)
                forks.append({"wide": wide, **fork})
                print(json.dumps({"seed": seed, **forks[-1]}), flush=True)
        if number < STEPS:
            step(model, optimizer, windows(tunnel.texts["train"], BATCH, generator), tail(number))
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
