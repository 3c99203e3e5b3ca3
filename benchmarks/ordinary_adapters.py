"""What ordinary adapters look like: the measures of `rankwise inspect --deep` over adapters of several methods.

The adapters are those of the wind tunnel (benchmarks/wind_tunnel.py: a byte model, 40 steps, each method at the first
rate of its ladder, LoRA from an eighth of it to four times as much) and those that benchmarks/squeezing_smollm2.py,
extracting.py and quantised_merge.py have left of SmolLM2-135M. What the package holds are the extremes of each measure.
An alarm is false where an adapter's layer lies past twice the extremes of all the other adapters.

    python benchmarks/ordinary_adapters.py
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import torch
from kjv import ADAPTERS
from wind_tunnel import METHODS, Tunnel, descend

import rankwise as rw
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
RUNS += [("lora", 4, share, "lora") for share in (0.125, 4.0)]
RUNS += [("lora", 4, 0.2, "dora"), *((method, 4, 1.0, "lora") for method in LORAS)]
STEPS = 40


def of_wind_tunnel() -> Iterator[tuple[str, Scan, float]]:
    tunnel = Tunnel()
    for method, rank, share, variant in RUNS:
        row = METHODS[method]
        row = type(row)(row.optimizer, row.rate, {**(row.adapter or {}), "variant": variant})
        model, generator = tunnel.started(row, rank, seed=0)
        optimizer = row.optimizer(model, row.rate * share)
        for step in range(STEPS):
            descend(model, optimizer, tunnel.batch(generator), 1 - step / STEPS)
        adapter = portable(model)
        yield f"byte model, {method}, {variant}, rank {rank}, rate {row.rate * share:g}", *scanned(adapter, model)


def of_smollm2() -> Iterator[tuple[str, Scan, float]]:
    base = locate_files(common.MODEL)
    for path in sorted(path for path in ADAPTERS.glob("*") if (path / "adapter_config.json").is_file()):
        yield f"SmolLM2-135M, {path.name}", *scanned(rw.read(path), base)


def scanned(adapter: Any, base: Any) -> tuple[Scan, float]:
    """The scan, and the fit to another base: the same weights with the rows and columns of each in another order."""
    weights, generator = {}, torch.Generator().manual_seed(0)
    orders: dict[int, torch.Tensor] = {}
    for path, site in adapter.sites.items():
        matrix = BaseWeights(base).matrix(path, site)
        rows, columns = (orders.setdefault(n, torch.randperm(n, generator=generator)) for n in matrix.shape)
        weights[f"{path}.weight"] = matrix[rows][:, columns]
    return rw.analysis.scan(adapter, base), rw.analysis.scan(adapter, weights).fit or 0.0


def extremes(rows: Mapping[str, Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Measure → the lowest and the highest value over all adapters."""
    bounds: dict[str, list[float]] = {}
    for measures in rows.values():
        for measure, (low, high) in measures.items():
            known = bounds.setdefault(measure, [low, high])
            bounds[measure] = [min(known[0], low), max(known[1], high)]
    return bounds


def false_alarms(rows: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """Adapters that stand out beside all the others, with the measures in which they do."""
    alarms = []
    for name, measures in rows.items():
        others = extremes({other: row for other, row in rows.items() if other != name})
        out = [
            measure
            for measure, (low, high) in measures.items()
            if measure in others
            and (high > others[measure][1] * MARGIN or (measure == "imbalance" and low < others[measure][0] / MARGIN))
        ]
        alarms += [f"{name}: {', '.join(out)}"] if out else []
    return alarms


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, list[float]]] = {}
    fits: dict[str, list[float]] = {}
    for name, scan, elsewhere in (*of_wind_tunnel(), *of_smollm2()):
        found = {measure: [v[measure] for v in scan.sites.values() if measure in v] for measure in MEASURES}
        rows[name] = {measure: [min(each), max(each)] for measure, each in found.items() if each}
        fits[name] = [round(scan.fit or 0.0, 2), round(elsewhere, 2)]
        print(name, fits[name], {k: [round(x, 3) for x in v] for k, v in rows[name].items()}, flush=True)
    alarms = false_alarms(rows)
    own, other = ([fit[i] for fit in fits.values()] for i in (0, 1))
    bounds = {measure: [float(f"{x:.4g}") for x in pair] for measure, pair in extremes(rows).items()}
    bounds["fit"] = [min(own), max(own)]
    made = {"made by": "benchmarks/ordinary_adapters.py", "adapters": len(rows), "false alarms": len(alarms)}
    PACKAGED.write_text(json.dumps({**made, "bounds": bounds}, indent=2) + "\n")
    fit = {"on its base": [min(own), max(own)], "on another": [min(other), max(other)]}
    content = {"machine": common.machine(), "adapters": rows, "fits": fits, "fit": fit, "false alarms": alarms}
    common.write("ordinary_adapters", content)


if __name__ == "__main__":
    main()
