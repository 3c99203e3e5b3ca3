"""Merging an adapter of SmolLM2-135M for storage in few bits: how far outputs move, by the way in which it is rounded.

The adapter is of rank 64, trained on the King James Bible (benchmarks/squeezing_smollm2.py). Divergence is the mean
KL(adapted in fp32 ‖ rounded) over tokens, of verses that were held out and of this repository's README.

- "apart": the base is rounded by its reader, the adapter is kept beside it: what QLoRA serves.
- "naive": the adapter is added to that rounded base, and the sum is rounded again by the reader.
- "folded": weight and adapter are added in fp32, and the reader rounds the sum.
- "merge_quantised": the same with scales by which least is lost.
- "merge_quantised, batches": with the inputs of 8 batches of 4 training verses, 128 tokens at most.

    python benchmarks/quantised_merge.py [--storages nf4 int4]
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import kjv
import torch
from torch import Tensor

import rankwise as rw
from rankwise.grids import GRIDS
from rankwise.planning import target_layers
from rankwise.train.quantised import mean_divergence

ADAPTER = kjv.ADAPTERS / "lora-64-0.0005-0"


def texts(prepared: kjv.Prepared) -> dict[str, list[dict[str, Tensor]]]:
    verses = [dict(batch) for batch, _ in zip(prepared.trainer.get_eval_dataloader(), range(1), strict=False)]
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    ids = prepared.tokenizer(readme, return_tensors="pt")["input_ids"][0][:256].view(1, 256)
    return {"verses": verses, "README": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]}


@torch.no_grad()
def outputs(model: Any, batches: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    """Logits at the tokens that are not padding."""
    for batch in batches:
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        yield logits[batch["attention_mask"].bool()]


def moved(model: Any, batches: list[dict[str, Tensor]], wanted: list[Tensor]) -> float:
    sums = [
        (len(logits), mean_divergence(logits, given))
        for logits, given in zip(wanted, outputs(model, batches), strict=True)
    ]
    return sum(count * mean for count, mean in sums) / sum(count for count, _ in sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", nargs="+", choices=GRIDS, default=list(GRIDS))
    storages = parser.parse_args().storages
    torch.set_num_threads(1)
    prepared = kjv.untrained(kjv.data(), per_device_train_batch_size=4, init_batches=8)
    model, probes = prepared.model, texts(prepared)
    layers = target_layers(model)
    base = {path: layer.weight.detach().clone() for path, layer in layers.items()}

    def put(weights: Callable[[str], Tensor]) -> None:
        for path, layer in layers.items():
            layer.weight.data = weights(path)

    def judged() -> dict[str, Any]:
        return {"KL": {name: round(moved(model, batches, wanted[name]), 5) for name, batches in probes.items()}}

    adapter = rw.read(ADAPTER)
    changes = {path: site.delta.dense() for path, site in adapter.sites.items()}
    wanted: dict[str, list[Tensor]] = {}
    put(lambda path: base[path] + changes[path])
    wanted |= {name: list(outputs(model, batches)) for name, batches in probes.items()}
    content: dict[str, Any] = {"machine": common.machine(), "storages": {}}
    for kind in storages:
        grid = GRIDS[kind]
        ways: dict[str, Callable[[str], Tensor]] = {
            "apart": lambda path, grid=grid: grid.read(base[path]) + changes[path],
            "naive": lambda path, grid=grid: grid.read(grid.read(base[path]) + changes[path]),
            "folded": lambda path, grid=grid: grid.read(base[path] + changes[path]),
        }
        rows: dict[str, Any] = {}
        for name, weights in ways.items():
            put(weights)
            rows[name] = judged()
            print(kind, name, rows[name], flush=True)
        for name, batches in (("merge_quantised", None), ("merge_quantised, batches", prepared.batches)):
            put(lambda path: base[path].clone())
            rw.load(model, ADAPTER, trainable=False)
            began = time.process_time()
            sites = rw.merge_quantised(model, kind, batches=batches).sites
            rows[name] = {
                "seconds": round(time.process_time() - began, 1),
                "error of weights": round(fmean(s.error for s in sites.values()), 4),
            }
            if batches is not None:
                rows[name]["error of outputs"] = round(fmean(site.output_error or 0.0 for site in sites.values()), 4)
            rows[name] |= judged()
            print(kind, name, rows[name], flush=True)
        content["storages"][kind] = rows
        common.write("quantised_merge", content)


if __name__ == "__main__":
    main()
