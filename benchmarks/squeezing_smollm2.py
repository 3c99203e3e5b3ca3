"""Train wide, ship narrow on SmolLM2-135M: rank 64 squeezed to 8 after its 32 steps, or before the last 8 of them.

The scale is 2 at either rank, the rate of rank 64 the one that is best on the validation samples of seed 0. What is
lost is counted in the weights, or in the layers' outputs on 8 training batches. Rank 8 trained as such is the LoRA of
results/compare_kjv.json, whose recipe and samples these are, at its own best rate.

    python benchmarks/squeezing_smollm2.py [--seeds 0 1 2]
"""

import argparse
import json
from typing import Any

import common
import kjv
import torch

import rankwise as rw
from rankwise.trials.preparing import with_adapter

WIDE, RANK, STEPS_AFTER = 64, 8, 8
RATES = (1e-3, 5e-4)


def wide(samples: kjv.Data, rate: float, seed: int, **changes: Any) -> tuple[str, dict[str, Any]]:
    """A run of rank 64: where its adapter lies, and its losses."""
    name = "-".join(["lora", str(WIDE), f"{rate:g}", str(seed), *map(str, changes.values())])
    path, said = kjv.ADAPTERS / name, kjv.ADAPTERS / f"{name}.json"
    if not said.is_file():
        prepared = kjv.trained(
            with_adapter(kjv.recipe(rank=WIDE, alpha=2 * WIDE, learning_rate=rate, seed=seed, **changes), samples)
        )
        row = {"rate": rate, "seed": seed, **kjv.judged(prepared, "validation", "test")}
        row |= {
            key: round(entry[key], 4)
            for entry in prepared.trainer.state.log_history
            for key in entry
            if key == "squeeze_error"
        }
        rw.save(prepared.model, path)
        said.write_text(json.dumps(row))
    row = json.loads(said.read_text())
    print(name, row, flush=True)
    return str(path), row


def squeezed(samples: kjv.Data, path: str, seed: int) -> dict[str, Any]:
    """An adapter of rank 64 cut to 8 in both ways, and what is left of it."""
    prepared, adapter = kjv.untrained(samples, seed=seed), rw.read(path)
    rw.load(prepared.model, path, trainable=False)
    inputs = rw.covariances(prepared.model, prepared.batches)
    rw.detach(prepared.model)
    rows: dict[str, Any] = {}
    for name, seen in (("weights", None), ("outputs", inputs)):
        narrow = rw.algebra.squeeze(adapter, rank=RANK, inputs=seen)
        rows[name] = {"error": round(narrow.error, 4), **kjv.judged_with(prepared, narrow.adapter)}
        print(seed, name, rows[name], flush=True)
    return rows


def narrow_from_the_start() -> list[dict[str, Any]]:
    path = common.RESULTS / "compare_kjv.json"
    runs = [run for run in json.loads(path.read_text())["runs"] if (run["arm"], run["rate"]) == ("LoRA", 2e-3)]
    return [
        {"seed": run["seed"], **{part: round(run[part]["loss"], 4) for part in ("validation", "test")}} for run in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    samples = kjv.data()
    tried = [wide(samples, rate, 0)[1] for rate in RATES]
    rate = min(tried, key=lambda row: row["validation"])["rate"]
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        path, whole = wide(samples, rate, seed)
        cut = squeezed(samples, path, seed)
        _, repaired = wide(samples, rate, seed, ship_rank=RANK, ship_steps=STEPS_AFTER)
        runs.append({"seed": seed, "wide": whole, "squeezed": cut, "repaired": repaired})
        content = {"machine": common.machine(), "wide": WIDE, "rank": RANK, "steps after": STEPS_AFTER, "rate": rate}
        common.write("squeezing_smollm2", content | {"rates": tried, "runs": runs, "narrow": narrow_from_the_start()})


if __name__ == "__main__":
    main()
