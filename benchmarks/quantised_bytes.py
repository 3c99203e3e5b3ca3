"""Merging for storage in few bits in the wind tunnel: what the held-out loss and the outputs are, by how it is rounded.

LoRA of rank 4, 30 steps at the first rate of its ladder, on the byte model of benchmarks/wind_tunnel.py.

- "apart": the base is rounded by its reader, the adapter is kept beside it: what QLoRA serves.
- "naive": the adapter is added to that rounded base, and the sum is rounded again by the reader.
- "folded": weight and adapter are added in fp32, and the reader rounds the sum.
- "merge_quantised": the same with scales by which least is lost.
- "merge_quantised, batches": with the inputs of 8 training batches.

    python benchmarks/quantised_bytes.py
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from wind_tunnel import METHODS, Tunnel, descend, loss_of

import rankwise as rw
from rankwise.format.save_load import portable
from rankwise.grids import GRIDS
from rankwise.planning import target_layers

STEPS = 30


@torch.no_grad()
def judged(model: nn.Module, wanted: Tensor, window: Tensor) -> dict[str, float]:
    """KL from the adapted model in nats a byte, and the loss, on a held-out part."""
    given = torch.log_softmax(model(window[:, :-1]), -1)
    divergence = kl_div(given.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
    return {"KL": round(float(divergence), 5), "loss": round(float(loss_of(model, window)), 4)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    tunnel, method = Tunnel(), METHODS["lora"]
    model, generator = tunnel.started(method, 4, seed=0)
    optimizer = method.optimizer(model, method.rate)
    for step in range(STEPS):
        descend(model, optimizer, tunnel.batch(generator), 1 - step / STEPS)
    window, changes = tunnel.held_out["test"], {p: s.delta.dense() for p, s in portable(model).sites.items()}
    with torch.no_grad():
        wanted = torch.log_softmax(model(window[:, :-1]), -1)
    plain = rw.detach(deepcopy(model))
    content: dict[str, Any] = {"machine": common.machine(), "adapted": round(float(loss_of(model, window).detach()), 4)}
    content |= {"base": round(float(loss_of(plain, window).detach()), 4), "storages": {}}
    for kind, grid in GRIDS.items():
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "apart": lambda base, change, grid=grid: grid.read(base) + change,
            "naive": lambda base, change, grid=grid: grid.read(grid.read(base) + change),
            "folded": lambda base, change, grid=grid: grid.read(base + change),
        }
        rows: dict[str, Any] = {}
        for name, stored in ways.items():
            merged = deepcopy(plain)
            for path, layer in target_layers(merged).items():
                layer.get_parameter("weight").data = stored(layer.get_parameter("weight").data, changes[path])
            rows[name] = judged(merged, wanted, window)
        for name, batches in (
            ("merge_quantised", None),
            ("merge_quantised, batches", tunnel.batches_to_come(generator)),
        ):
            merged = deepcopy(model)
            rw.merge_quantised(merged, kind, batches=batches, forward=lambda model, batch: model(batch[:, :-1]))
            rows[name] = judged(merged, wanted, window)
        content["storages"][kind] = rows
        print(kind, rows, flush=True)
    common.write("quantised_bytes", content)


if __name__ == "__main__":
    main()
