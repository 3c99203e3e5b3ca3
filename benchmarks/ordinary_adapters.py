"""What ordinary adapters look like: the measures of `rankwise inspect --deep` over adapters of several methods.

The adapters are those of the wind tunnel (benchmarks/wind_tunnel.py: a byte model, 30 steps, each method at the first
rate of its ladder, LoRA also at an eighth of it) and those that benchmarks/squeezing_smollm2.py and extracting.py have
left of SmolLM2-135M, of which 70 layers are looked at. What the package holds are the extremes of each measure. An
alarm is false where an adapter's layer lies past twice the extremes of all the other adapters. LoRA at four times the
rate is no ordinary adapter; what stands out in it is said apart.

    python benchmarks/ordinary_adapters.py
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import common
import torch
from kjv import ADAPTERS
from wind_tunnel import METHODS, Tunnel, descend

import rankwise as rw
from rankwise.adapter import Adapter
from rankwise.analysis.scanning import MARGIN, MEASURES, Scan
from rankwise.base_weights import BaseWeights
from rankwise.format.save_load import portable
from rankwise.train.model.skeleton import locate_files

PACKAGED = Path(rw.analysis.__file__).parent / "ordinary.json"
LORAS = (
    "rslora",
    "pissa",
    "lora-ga",
    "lora-plus",
    "lora-pro",
    "scaled-adam",
    "loft",
    "lora-muon",
    "polora",
    "spectral",
)
RUNS = [("lora", rank, 1.0, "lora") for rank in (1, 4, 64)]
RUNS += [("lora", 4, 0.125, "lora")]
RUNS += [("lora", 4, 0.2, "dora"), *((method, 4, 1.0, "lora") for method in LORAS)]
TOO_HIGH = ("lora", 4, 4.0, "lora")  # a rate at which the model falls apart
STEPS = 30


def of_wind_tunnel() -> Iterator[tuple[str, Scan, float]]:
    tunnel = Tunnel()
    for method, rank, share, variant in (*RUNS, TOO_HIGH):
        row = METHODS[method]
        row = type(row)(row.optimizer, row.rate, {**(row.adapter or {}), "variant": variant})
        model, generator = tunnel.started(row, rank, seed=0)
        optimizer = row.optimizer(model, row.rate * share)
        for step in range(STEPS):
            descend(model, optimizer, tunnel.batch(generator), 1 - step / STEPS)
        adapter = portable(model)
        yield named(method, rank, share, variant), *scanned(adapter, model)


def named(method: str, rank: int, share: float, variant: str) -> str:
    return f"byte model, {method}, {variant}, rank {rank}, rate {METHODS[method].rate * share:g}"


def of_smollm2() -> Iterator[tuple[str, Scan, float]]:
    base = locate_files(common.MODEL)
    for path in sorted(path for path in ADAPTERS.glob("*") if (path / "adapter_config.json").is_file()):
        yield f"SmolLM2-135M, {path.name}", *scanned(rw.read(path), base)


def scanned(adapter: Adapter, base: Any) -> tuple[Scan, float]:
    """The scan, and the fit to another base: the same weights with the rows and columns of each in another order."""
    weights, generator = {}, torch.Generator().manual_seed(0)
    orders: dict[int, torch.Tensor] = {}
    some = with_sites(adapter, 24)
    for path, site in some.sites.items():
        matrix = BaseWeights(base).matrix(path, site)
        rows, columns = (orders.setdefault(n, torch.randperm(n, generator=generator)) for n in matrix.shape)
        weights[f"{path}.weight"] = matrix[rows][:, columns]
    return rw.analysis.scan(with_sites(adapter, 70), base), rw.analysis.scan(some, weights).fit or 0.0


def with_sites(adapter: Adapter, count: int) -> Adapter:
    """The adapter with so many of its layers at most, evenly spread."""
    paths = list(adapter.sites)
    step = -(-len(paths) // count)
    return replace(adapter, sites={path: adapter.sites[path] for path in paths[::step]})


def extremes(rows: Mapping[str, Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Measure → the lowest and the highest value over all adapters."""
    bounds: dict[str, list[float]] = {}
    for measures in rows.values():
        for measure, (low, high) in measures.items():
            known = bounds.setdefault(measure, [low, high])
            bounds[measure] = [min(known[0], low), max(known[1], high)]
    return bounds


def standing_out(measures: Mapping[str, list[float]], ordinary: Mapping[str, list[float]]) -> list[str]:
    """Measures in which a layer lies past the margin around these extremes."""
    return [
        measure
        for measure, (low, high) in measures.items()
        if measure in ordinary
        and (high > ordinary[measure][1] * MARGIN or (measure == "imbalance" and low < ordinary[measure][0] / MARGIN))
    ]


def summary(rows: dict[str, dict[str, list[float]]], fits: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of the measures, beside which each adapter is looked at with the extremes of all the others."""
    rows = dict(rows)
    extreme = rows.pop(named(*TOO_HIGH))
    alarms = {}
    for name, measures in rows.items():
        others = extremes({other: row for other, row in rows.items() if other != name})
        if out := standing_out(measures, others):
            alarms[name] = out
    own, other = ([fit[i] for fit in fits.values()] for i in (0, 1))
    return {
        "adapters": rows,
        "bounds": {measure: [float(f"{x:.4g}") for x in pair] for measure, pair in extremes(rows).items()},
        "false alarms": alarms,
        "at four times the rate": standing_out(extreme, extremes(rows)),
        "fits": fits,
        "fit": {"on its base": [min(own), max(own)], "on another": [min(other), max(other)]},
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, list[float]]] = {}
    fits: dict[str, list[float]] = {}
    for name, scan, elsewhere in chain(of_wind_tunnel(), of_smollm2()):
        found = {measure: [v[measure] for v in scan.sites.values() if measure in v] for measure in MEASURES}
        rows[name] = {measure: [min(each), max(each)] for measure, each in found.items() if each}
        fits[name] = [round(scan.fit or 0.0, 2), round(elsewhere, 2)]
        print(name, fits[name], {k: [round(x, 3) for x in v] for k, v in rows[name].items()}, flush=True)
    content = summary(rows, fits)
    common.write("ordinary_adapters", {"machine": common.machine(), **content})
    made = {"made by": "benchmarks/ordinary_adapters.py", "adapters": len(content["adapters"])}
    bounds = content["bounds"] | {"fit": content["fit"]["on its base"]}
    PACKAGED.write_text(json.dumps({**made, "false alarms": len(content["false alarms"]), "bounds": bounds}) + "\n")


if __name__ == "__main__":
    main()
