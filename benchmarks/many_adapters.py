"""Many named adapters on one small model: what the last one costs beside the first.

    python benchmarks/many_adapters.py [--rounds 3]

Adapters of rank 2 are attached one after the other, each is made the active one in turn, and they are detached one by
one. A library whose calls look at every adapter pays more for each the more there are; here the cost of one adapter
must not depend on how many there are. The clock is the process's CPU time, with one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, write
from torch import nn

import rankwise as rw

COUNTS = (100, 200, 400, 1000)
SPEC = rw.LoRA(rank=2)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(4)))


def seconds(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def life(count: int) -> dict[str, float]:
    """Seconds of attaching, activating and detaching this many adapters on a fresh model."""
    adapted, names = model(), [f"adapter{number}" for number in range(count)]
    steps: dict[str, Callable[[str], Any]] = {
        "attach": lambda name: rw.attach(adapted, SPEC, name=name),
        "activate": lambda name: rw.activate(adapted, name),
        "detach": lambda name: rw.detach(adapted, name),
    }
    return {step: seconds(lambda call=call: [call(name) for name in names]) for step, call in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    life(10)  # warm up
    lives = [{count: life(count) for count in COUNTS} for _ in range(rounds)]  # A B C D, A B C D, …
    result: dict[str, Any] = {"what": __doc__, "machine": machine(), "rounds": rounds, "layers": 8}
    for step in ("attach", "activate", "detach"):
        per_adapter = [{count: of[count][step] / count for count in COUNTS} for of in lives]
        ratios = [cost[400] / cost[100] for cost in per_adapter]
        result[step] = {
            "seconds": {count: round(statistics.median(of[count][step] for of in lives), 4) for count in COUNTS},
            "cost of one adapter, with 400 over with 100": {
                "median": round(statistics.median(ratios), 3),
                "min": round(min(ratios), 3),
                "max": round(max(ratios), 3),
            },
        }
        print(step, result[step], flush=True)
    write("many_adapters", result)


if __name__ == "__main__":
    main()
