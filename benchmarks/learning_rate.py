"""Where `learning_rate: auto` lands: its rate over the tuned one, cell by cell of methods, ranks, models and tasks.

The tuned rates are those of results on file, each found by factors of two with a worse rate on either side: the wind
tunnel's, those of the studies and the demo on SmolLM2-135M, and, where its directory is named, a comparison's runs.

    python benchmarks/learning_rate.py wind-tunnel               # a byte model: seconds a cell
    python benchmarks/learning_rate.py smollm2                   # minutes a cell
    python benchmarks/learning_rate.py smollm2 --comparison build/comparison/kjv
    python benchmarks/learning_rate.py schedules                 # which rates short runs prefer, by their schedule

Cells are kept in results/learning_rate.json and none is made twice; schedules in results/probe_schedules.json.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import wind_tunnel
from rich.console import Console

import rankwise as rw
from rankwise.optim import OPTIMIZERS
from rankwise.train import recipe as recipes
from rankwise.train.demo import recipe as demo_recipe
from rankwise.train.learning_rate.choice import HELD_BACK, Choice, Search, probe_length
from rankwise.train.learning_rate.guess import first_guess
from rankwise.train.learning_rate.probe import Probe
from rankwise.train.run import run

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "learning_rate.json"


@dataclass(frozen=True)
class Cell:
    """A method on a task, with the losses of the rates that were tried.

    Attributes:
        losses: rate → held-out loss of a whole run, all of one seed.
        recipe: fields of the run, but for its rate; none in the wind tunnel.
    """

    task: str
    method: str
    rank: int
    losses: dict[float, float]
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def tuned(self) -> float | None:
        """The best rate; None where no worse one was tried on both sides."""
        rates = sorted(self.losses)
        best = min(rates, key=self.losses.__getitem__)
        return best if best not in (rates[0], rates[-1]) else None


# --- the wind tunnel -------------------------------------------------------------------------------------------------


def of_wind_tunnel() -> Iterator[Cell]:
    losses: dict[tuple[str, int], dict[float, float]] = {}
    for done in json.loads((RESULTS / "wind_tunnel.json").read_text())["runs"]:
        if done["seed"] == 0 and done["steps"] == wind_tunnel.STEPS:
            losses.setdefault((done["method"], done["rank"]), {})[done["rate"]] = done["validation"]
    for (method, rank), tried in losses.items():
        row = wind_tunnel.METHODS[method]
        if row.adapter is not None and row.restart_every is None and "unit" not in method:
            yield Cell("byte model", method, rank, tried)


def row_of(method: str) -> str:
    """The optimizer's row: methods that have none of their own name are AdamW's, but for the spectral step's."""
    return method if method in OPTIMIZERS else "spectral" if method.startswith("spectral") else "adamw"


def chosen_in_wind_tunnel(cell: Cell, tunnel: wind_tunnel.Tunnel) -> Choice:
    method, each = wind_tunnel.METHODS[cell.method], probe_length(wind_tunnel.STEPS)
    model, generator = tunnel.started(method, cell.rank, seed=0)
    batches = [tunnel.batch(generator) for _ in range(each + HELD_BACK)]
    parts = [[batch] for batch in batches[:each]]

    def optimizer(rate: float) -> torch.optim.Optimizer:
        return method.optimizer(model, rate)

    sites = [pair.layer.site for pair in rw.pairs(model)]
    rules = first_guess(model, sites, OPTIMIZERS[row_of(cell.method)], optimizer, wind_tunnel.STEPS)
    probe = Probe(model, parts, batches[each:], wind_tunnel.loss_of, optimizer)
    return Search(rules, probe, wind_tunnel.STEPS).choose()


SCHEDULED = {"lora": 1e-2, "lora, betas 0.8 0.99": 1e-2, "lora-plus": 2e-3}  # with their tuned rates
RUNGS = range(-3, 5)  # of factors of two from these


def schedules(tunnel: wind_tunnel.Tunnel) -> list[dict[str, Any]]:
    """The loss of batches held back after short runs at a constant rate, and at one that falls to zero."""
    rows = []
    for name, tuned in SCHEDULED.items():
        method, rates = wind_tunnel.METHODS[name], [tuned * 2.0**rung for rung in RUNGS]
        for falls, steps in ((False, 10), (False, 20), (True, 10), (True, 20)):
            losses = {rate: scheduled(tunnel, method, rate, steps, falls) for rate in rates}
            rows.append({"method": name, "falls": falls, "steps": steps, "losses": sorted(losses.items())})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def scheduled(tunnel: wind_tunnel.Tunnel, method: wind_tunnel.Method, rate: float, steps: int, falls: bool) -> float:
    model, generator = tunnel.started(method, rank=4, seed=0)
    optimizer = method.optimizer(model, rate)
    for step in range(steps):
        share = 1 - step / steps if falls else 1.0
        wind_tunnel.descend(model, optimizer, tunnel.batch(generator), share)
    others = torch.Generator().manual_seed(777)
    with torch.no_grad():
        return math.fsum(wind_tunnel.loss_of(model, tunnel.batch(others)).item() for _ in range(HELD_BACK)) / HELD_BACK


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------


def of_smollm2(comparisons: Iterable[Path]) -> Iterator[Cell]:
    demo = json.loads((RESULTS / "demo_learning_rates.json").read_text())["runs"]
    for method in ("LoRA", "LoRA-GA"):
        tried = {done["learning_rate"]: done["held_out_loss"] for done in demo if done["method"] == method}
        fields = demo_recipe(method, Path("unused")).model_dump(exclude_defaults=True)
        yield Cell("SmolLM2, demo", method, 8, tried, fields)
    for name in ("ranks", "weight_types"):
        study = json.loads((RESULTS / f"study_{name}.json").read_text())
        for arm, outcome in study["arms"].items():
            tried = {float(rate): loss for rate, loss in outcome["tried"].items()}
            fields = study["recipe"] | {"rank": outcome["rank"]}
            if name == "weight_types":
                fields["target_modules"] = kinds(arm)
            yield Cell(
                "SmolLM2, study", f"LoRA on {arm if name == 'weight_types' else 'q, v'}", outcome["rank"], tried, fields
            )
    for directory in comparisons:
        yield from of_comparison(directory)


def kinds(arm: str) -> Any:
    return "all-linear" if arm == "all" else [f"{letter}_proj" for letter in arm]


def of_comparison(directory: Path) -> Iterator[Cell]:
    """The first seed's whole runs of each arm that trains an adapter."""
    groups: dict[str, tuple[dict[str, Any], dict[float, float]]] = {}
    for path in sorted(directory.glob("runs/*/outcome.json")):
        outcome = json.loads(path.read_text())
        fields = {name: value for name, value in outcome["run"].items() if name in recipes.Recipe.model_fields}
        if outcome["run"]["full"] is None and fields.get("seed", 0) == 0:
            rate = fields.pop("learning_rate", None) or recipes.parse(fields).peak_learning_rate
            loss = outcome["validation"]["loss"] if "validation" in outcome else math.inf
            groups.setdefault(json.dumps(fields, sort_keys=True), (fields, {}))[1][rate] = loss
    most = max((fields["max_steps"] for fields, _ in groups.values()), default=0)
    for fields, tried in groups.values():
        if fields["max_steps"] == most:
            named = [fields.get(name, "") for name in ("init", "scaling", "optimizer", "adam_beta2")]
            method = ", ".join(str(name) for name in named if name) or "LoRA"
            yield Cell(f"SmolLM2, {directory.name}", method, fields.get("rank", 8), tried, fields)


def chosen_on_smollm2(cell: Cell) -> Choice:
    quiet = Console(quiet=True)
    fields = cell.recipe | {"learning_rate": "auto", "output_dir": "build/learning_rate", "max_eval_samples": 8}
    prepared = run.prepare(run.load(recipes.parse(fields), quiet), quiet)
    assert prepared.search is not None
    return prepared.search.choose()


# --- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", choices=["wind-tunnel", "smollm2", "schedules"])
    parser.add_argument("--comparison", nargs="+", type=Path, default=[], help="directories of `rankwise compare`")
    parser.add_argument("--only", help="cells whose task and method hold this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cells == "schedules":
        rows = schedules(wind_tunnel.Tunnel())
        lines = ",\n".join(" " + json.dumps(row) for row in rows)
        (RESULTS / "probe_schedules.json").write_text(f"[\n{lines}\n]\n")
        return
    in_tunnel = options.cells == "wind-tunnel"
    cells = list(of_wind_tunnel() if in_tunnel else of_smollm2(options.comparison))
    tunnel = wind_tunnel.Tunnel() if in_tunnel else None
    for cell in cells:
        name = {"task": cell.task, "method": cell.method, "rank": cell.rank}
        known = any(all(row[key] == value for key, value in name.items()) for row in on_file())
        if cell.tuned is None or known or (options.only and options.only not in f"{cell.task}: {cell.method}"):
            continue
        start = time.process_time()
        choice = chosen_on_smollm2(cell) if tunnel is None else chosen_in_wind_tunnel(cell, tunnel)
        row = name | {"tuned": cell.tuned, "losses": sorted(cell.losses.items()), **choice.to_dict()}
        rows = [*on_file(), row | {"seconds": round(time.process_time() - start, 1)}]
        print(f"{cell.task:20} {cell.method:28} {cell.rank:3} tuned {cell.tuned:8.3g} {choice}", flush=True)
        FILE.write_text(text(rows))
    near = [within_two(row) for row in on_file()]
    print(f"within a factor of two of the tuned rate: {sum(near)} of {len(near)} cells")


def on_file() -> list[dict[str, Any]]:
    """The cells that are done, of another process too."""
    cells: list[dict[str, Any]] = json.loads(FILE.read_text())["cells"] if FILE.exists() else []
    return cells


def within_two(row: dict[str, Any]) -> bool:
    return bool(0.5 <= row["rate"] / row["tuned"] <= 2)


def text(rows: list[dict[str, Any]]) -> str:
    """One cell a line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f'{{"torch": "{torch.__version__}",\n "cells": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
