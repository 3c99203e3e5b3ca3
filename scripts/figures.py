"""Fill the tables of README.md and docs/ from the code and from benchmarks/results/, and draw README's picture.

python scripts/figures.py            # rewrite
python scripts/figures.py --check    # exit 1 if a file is out of date
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from math import log2
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rankwise.combinations import COMBINATIONS
from rankwise.inits import INITS
from rankwise.inspection.engines import ENGINES, REMEDIES
from rankwise.optim import OPTIMIZERS
from rankwise.scaling import SCALINGS
from rankwise.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from import_order import order  # noqa: E402
from outcome_picture import picture  # noqa: E402
from site_tables import other_names  # noqa: E402


def result(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return content


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def methods() -> str:
    kinds: list[tuple[str, Any]] = [("init", INITS), ("scaling", SCALINGS), ("variant", VARIANTS)]
    kinds += [("optimizer", OPTIMIZERS), ("combination", COMBINATIONS)]
    rows = [
        [kind, f"`{name}`", entry.summary, entry.paper] for kind, entries in kinds for name, entry in entries.items()
    ]
    return table(["", "name", "what it does", "paper"], rows)


def scientific(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def first_step() -> str:
    found = result("first_step_alignment")
    rows = [
        [
            name,
            f"{row['sgd']['mean']:.3f} ({row['sgd']['min']:.2f}–{row['sgd']['max']:.2f})",
            f"{row['adamw']['mean']:.3f} ({row['adamw']['min']:.2f}–{row['adamw']['max']:.2f})",
        ]
        for name, row in found["starts"].items()
    ]
    head = ["start", "SGD: mean cosine (min–max)", "Adam: mean cosine (min–max)"]
    return (
        f"Cosine between the first step of the adapter and of full fine-tuning, over the {found['layers']} linear "
        f"layers of SmolLM2-135M, r = {found['rank']}; gradient of 8 batches of 4 × 128 tokens:\n\n" + table(head, rows)
    )


def difference_form() -> str:
    found = result("exactness")["difference form"]
    rows = []
    for start, deltas in found.items():
        cells = [f"{deltas[d][who]:.2%}" for d in deltas for who in ("rankwise", "peft")]
        rows.append([f"`{start}`", *cells])
    sizes = list(next(iter(found.values())))
    head = ["start", *(f"{who}, {size.replace('|', '')}" for size in sizes for who in ("rankwise", "PEFT's storage"))]
    return "Relative error of ΔW·x in bf16 against fp64, 1024², r = 8:\n\n" + table(head, rows)


def starts() -> str:
    found = result("exactness")["starts"]
    rows = [
        [
            f"`{name}`",
            scientific(row["logit gap after attach"]),
            "yes" if all(row["base bit-identical after training, and after merge + detach"]) else "NO",
            scientific(row["relative logit gap to PEFT reading our file"]),
            scientific(row["relative logit gap merged"]),
        ]
        for name, row in found.items()
        if not isinstance(row, str)
    ]
    head = ["start", "after attach", "base bit-identical", "PEFT reading our file", "merged"]
    return (
        "SmolLM2-135M in fp32 after two steps of training, largest difference of a logit over the largest logit:\n\n"
        + table(head, rows)
    )


def training_step() -> str:
    found = result("training_step")
    rows = []
    for name in (n for n in found if n.startswith(("float32", "bfloat16"))):
        row = found[name]
        cells = [row[f"{who} / floor"] for who in ("rankwise", "rankwise, anchored start", "peft")]
        cells.append(row["peft / rankwise"])
        rows.append([name, *(f"{c['ratio_of_medians']:.2f} ({c['min']:.2f}–{c['max']:.2f})" for c in cells)])
    head = ["", "rankwise / floor", "anchored start / floor", "PEFT / floor", "PEFT / rankwise"]
    text = (
        "A training step (forward + backward) of SmolLM2-135M, batch 4 × 128, r = 8, all linear layers, over the "
        "frozen model's; median ratio (min–max), interleaved in one process, "
        f"{found['machine']['threads']} thread, {found['clock']}:\n\n"
    )
    rest = [
        [name, f"{row['peft / rankwise']['ratio_of_medians']:.1f}×"]
        for name, row in found.get("housekeeping", {}).items()
    ]
    return text + table(head, rows) + ("\n\n" + table(["", "PEFT's time / rankwise's"], rest) if rest else "")


def evidence() -> str:
    found = result("gradient_evidence")
    quality, cost, memory = found["quality"], found["cost"], found["memory"]["MiB above the model"]
    shares = [
        [name, f"{row['mean']:.2%}", f"{row['worst layer']:.2%}"]
        for name, row in quality["share of the optimum"].items()
    ]
    updates = [[shape, f"{row['update / product']['ratio_of_medians']:.2f}"] for shape, row in found["update"].items()]
    times = [
        [name, f"{cost['seconds'][key]['median']:.0f} s", f"{memory[key]:.0f} MiB"]
        for name, key in (("rankwise, sketch", "sketch"), ("rankwise, exact", "exact"), ("PEFT", "peft"))
    ]
    times.append(["(training, LoRA and AdamW)", "", f"{memory['training']:.0f} MiB"])
    trained = result("sketched_start")
    gaps, spread = trained["sketch - exact"], trained["standard deviation over seeds"]["exact"]
    storage = quality["numbers stored / exact gradients'"]["factor"]
    return "\n\n".join(
        (
            f"SmolLM2-135M, {quality['layers']} layers, r = {found['rank']}, 8 batches of 4 × 128 tokens. Share of the "
            "energy that the exact gradient's LoRA-GA pair captures of G, for the pair from a sketch (4r directions "
            f"hold {storage:.1%} of the numbers):",
            table(["gradient", "mean", "worst layer"], shares),
            "The whole start (gradients, directions, adapter), on one thread:",
            table(["", "CPU time", "peak memory above the model"], times),
            "One sketch update over the product dYᵀX that it stands for, on one thread:",
            table(["layer", "time ratio"], updates),
            f"Held-out loss after {trained['steps']} steps from the sketched start less that from the exact one, seeds "
            f"{', '.join(map(str, trained['seeds']))}: {gaps['mean']:+.4f} on average, {gaps['largest']:+.4f} at most "
            f"(standard deviation of the exact one over seeds: {spread:.3f}).",
        )
    )


def dora() -> str:
    found = result("dora_layer")

    def cells(row: dict[str, Any]) -> list[str]:
        ratios = (row[key] for key in ("rankwise_over_floor", "peft_over_floor", "peft_over_rankwise"))
        return [f"{each['ratio']:.2f} ({each['min']:.2f}–{each['max']:.2f})" for each in ratios]

    rows = [
        [f"1024 × 1024, {row['dtype']}, {row['tokens']} tokens, dropout {row['dropout']:g}", *cells(row)]
        for row in found["layers"]
    ]
    step = found["step"]
    rows.append([f"step of {step['model']}, {step['dtype']}", *cells(step)])
    head = ["", "rankwise / floor", "PEFT / floor", "PEFT / rankwise"]
    lora = step["lora_over_floor"]["ratio"]
    return (
        table(head, rows)
        + f"\n\nThe floor is the frozen layer or model; plain LoRA's whole step took {lora:.2f} of it."
    )


def arms(name: str) -> str:
    found = result(f"study_{name}")["arms"]
    seeds = list(next(iter(found.values()))["losses"])
    means = {seed: fmean(arm["losses"][seed] for arm in found.values()) for seed in seeds}
    rows = []
    for arm, each in found.items():
        gaps = [each["losses"][seed] - means[seed] for seed in seeds]
        rate = f"{each['learning_rate']:g}" + ("" if each["bracketed"] else " (at the edge)")
        rows.append(
            [
                arm,
                str(each["rank"]),
                f"{each['parameters']:,}",
                rate,
                f"{fmean(gaps):+.4f}",
                *map("{:+.4f}".format, gaps),
            ]
        )
    head = ["arm", "rank", "parameters", "best rate", "beside the seed's mean", *(f"seed {seed}" for seed in seeds)]
    losses = ", ".join(f"seed {seed}: {mean:.4f}" for seed, mean in means.items())
    return f"Held-out loss less the mean over all arms of the same seed ({losses}):\n\n" + table(head, rows)


def similarity(name: str) -> str:
    found = result("study_subspace")[name]
    rows = [
        [
            f"`{module}`",
            f"{phi[0][0]:.2f}",
            f"{phi[-1][0]:.2f}",
            f"{phi[-1][-1]:.2f}",
            f"{found['by_chance'][module]:.2f}",
        ]
        for module, phi in found["by_module"].items()
    ]
    head = ["module", "φ(1, 1)", "φ(all, 1)", "φ(all, all)", "by chance, φ(all, all)"]
    return f"{found['first']} and {found['second']}:\n\n" + table(head, rows)


def amplification() -> str:
    rows = []
    for rank, modules in result("study_amplification")["by_rank"].items():
        for module, layers in modules.items():
            means = {key: fmean(layer[key] for layer in layers) for key in layers[0] if key != "rank"}
            numbers = [f"{means[key]:.3g}" for key in ("change", "along_change", "along_weight", "along_random")]
            rows.append([rank, f"`{module}`", *numbers, f"{means['factor']:.2f}"])
    head = ["rank", "module", "‖ΔW‖", "‖UᵀWV‖ along ΔW", "along W's own", "along random", "amplification"]
    return "Means over 30 layers:\n\n" + table(head, rows)


def intrinsic() -> str:
    found = result("study_intrinsic_dimension")
    rows = [
        [
            kind,
            f"{int(dimension):,}",
            f"{tuned['rate']:g}" + ("" if tuned["bracketed"] else " (at the edge)"),
            f"{tuned['loss']:.4f}",
        ]
        for kind, search in found["searches"].items()
        for dimension, tuned in search["tried"].items()
    ]
    reached = "; ".join(
        f"{kind}: d₉₀ = {search['d90']:,}" if search["d90"] else f"{kind}: d₉₀ above all that were tried"
        for kind, search in found["searches"].items()
    )
    return (
        f"{reached}. Held-out loss before {found['pretrained']:.4f}, after training all {found['weights']:,} weights "
        f"of the linear layers {found['full']['loss']:.4f} (rate {found['full']['rate']:g}), so the goal is "
        f"{found['goal']:.4f}:\n\n" + table(["projection", "dimension", "best rate", "held-out loss"], rows)
    )


def analyze() -> str:
    found = result("analyze")
    rows = [[name, f"{value:.0f} s"] for name, value in found.items() if isinstance(value, float)]
    memory = [[name, f"{value:.2f}"] for name, value in found["peak memory, in dense fp32 layers"].items()]
    return (
        f"{found['machine']['threads']} threads:\n\n"
        + table(["", "time"], rows)
        + "\n\n"
        + table(["one layer", "peak memory above the base, in dense fp32 layers"], memory)
    )


def classification() -> str:
    found = result("classification")
    rows = [
        [run["method"], f"{run['learning_rate']:g}", f"{run['accuracy']:.1%}", f"{run['held_out_loss']:.3f}"]
        for run in sorted(found["runs"], key=lambda run: (run["method"], run["learning_rate"]))
    ]
    seeds = sorted({run["seed"] for run in found["runs"]})
    return f"Rank 8, one epoch, seed {', '.join(map(str, seeds))}; {found['held_out']}:\n\n" + table(
        ["method", "learning rate", "held-out accuracy", "held-out loss"], rows
    )


def wind_tunnel() -> str:
    """Each method and rank at the rate that did best on the validation part with the first seed."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in result("wind_tunnel")["runs"]:
        if run["steps"] == 80:  # the others look for the shortest schedule
            groups.setdefault((run["method"], run["rank"]), []).append(run)
    rows = []
    for (method, rank), runs in groups.items():
        best = min((run for run in runs if run["seed"] == 0), key=lambda run: run["validation"])
        tests = [run["test"] for run in runs if run["rate"] == best["rate"]]
        spread = f" ± {stdev(tests):.3f}" if len(tests) > 1 else ""
        cells = [f"{best['rate']:g}", f"{best['validation']:.3f}", f"{fmean(tests):.3f}{spread}", str(len(tests))]
        rows.append([method, str(rank) if rank else "all weights", *cells])
    rows.sort(key=lambda row: float(row[4].split()[0]))
    return table(["method", "rank", "best rate", "validation", "test, mean ± sd over seeds", "seeds"], rows)


def learning_rates() -> str:
    """Where `learning_rate: auto` lands beside the tuned rate, the farthest first."""
    rows = []
    cells = sorted(result("learning_rate")["cells"], key=lambda cell: -abs(log2(cell["rate"] / cell["tuned"])))
    for cell in cells:
        ratio = cell["rate"] / cell["tuned"]
        tried = f"{len(cell['tried'])}" if cell["bracketed"] else f"{len(cell['tried'])}, no worse one on one side"
        rates = [f"{cell[name]:.2g}" for name in ("guess", "rate", "tuned")]
        rows.append(
            [cell["task"], cell["method"], str(cell["rank"]), *rates, f"{ratio:.2f}", tried, str(cell["steps"])]
        )
    near = [0.5 <= cell["rate"] / cell["tuned"] <= 2 for cell in cells]
    guesses = [0.5 <= cell["guess"] / cell["tuned"] <= 2 for cell in cells]
    head = ["task", "method", "rank", "guess", "auto", "tuned", "auto / tuned", "rates tried", "steps"]
    return (
        f"Within a factor of two of the tuned rate: {sum(near)} of {len(cells)} cells; the guess alone: "
        f"{sum(guesses)}.\n\n{table(head, rows)}"
    )


def squeezing() -> str:
    """Test losses: the wide run at the same step, squeezed, and at the end; means over seeds."""
    content = result("squeezing")
    groups: dict[tuple[int, int, bool, bool], list[dict[str, Any]]] = {}
    for run in content["runs"]:
        for fork in run["shipped"]:
            key = fork["rank"], fork["repair"], fork["schedule"] == "own", fork["weighted"]
            groups.setdefault(key, []).append(fork)
    rows = []
    for (rank, repair, own, weighted), forks in sorted(groups.items(), key=lambda item: (-item[0][0], *item[0][1:])):
        tests = [[fork[when]["test"] for fork in forks] for when in ("wide", "squeezed", "repaired")]
        spread = f" ± {stdev(tests[-1]):.3f}" if len(forks) > 1 else ""
        error = f"{fmean(fork['error'] for fork in forks):.1%}"
        losses = [f"{fmean(values):.3f}" for values in tests]
        rates = "" if repair == 0 else "from 0.8 × peak" if own else "tail"
        lost_in = "outputs" if weighted else "weights"
        rows.append([str(rank), str(repair), rates, lost_in, error, *losses[:2], losses[2] + spread])
    wide = [run["wide"]["test"] for run in content["runs"]]
    head = [
        "rank",
        "steps after",
        "their rates",
        "lost in",
        "error",
        "before",
        "squeezed",
        "at step 80, ± sd over seeds",
    ]
    said = f"Rank {content['rank']} itself ends at {fmean(wide):.3f}" + (
        f" ± {stdev(wide):.3f}" if len(wide) > 1 else ""
    )
    return f"{said} ({len(wide)} seeds). Loss on the test part of the wind tunnel:\n\n" + table(head, rows)


def probe_schedules() -> str:
    """The best rate of short runs by their schedule."""
    found: Any = result("probe_schedules")
    head = ["method", "constant, 10 steps", "constant, 20", "to zero, 10 steps", "to zero, 20"]
    rows: dict[str, list[str]] = {}
    for run in found:
        best = min(run["losses"], key=lambda pair: pair[1])[0]
        rows.setdefault(run["method"], [run["method"]]).append(f"{best:g}")
    return table(head, list(rows.values()))


def combine() -> str:
    found = result("combine")
    rows = [[name, f"{row['seconds']:.1f} s", f"{row['peak MiB']} MiB"] for name, row in found["methods"].items()]
    return (
        f"Two adapters of rank {found['rank']} on all linear layers of {found['shapes']}'s shapes, CPU time on one "
        "thread and the peak memory of the whole process:\n\n" + table(["method", "time", "peak memory"], rows)
    )


def quantised() -> str:
    """Divergences and losses by storage and way."""
    found = result("quantised_bytes")
    ways = list(next(iter(found["storages"].values())))
    rows = [
        [f"`{kind}`", *(f"{rows[way]['KL']:.5f} ({rows[way]['loss']:.3f})" for way in ways)]
        for kind, rows in found["storages"].items()
    ]
    return (
        f"LoRA on the byte model: KL from the adapted model, nats a byte, and in brackets the held-out loss (adapted "
        f"{found['adapted']:.3f}, base {found['base']:.3f}). `apart`: the adapter beside a rounded base; `naive`: "
        "added to it and rounded again; `folded`: added to the full-precision base and rounded by the reader:\n\n"
        + table(["storage", *ways], rows)
    )


def squeezing_smollm2() -> str:
    """Test losses seed by seed: wide, cut, repaired, and narrow from the start."""
    found = result("squeezing_smollm2")
    narrow = {row["seed"]: row["test"] for row in found["narrow"]}
    rows = []
    for run in found["runs"]:
        cut = run["squeezed"]
        cells = [f"{cut[way]['test']:.3f} ({cut[way]['error']:.0%})" for way in ("weights", "outputs")]
        losses = [f"{value:.3f}" for value in (run["repaired"]["test"], narrow[run["seed"]])]
        rows.append([str(run["seed"]), f"{run['wide']['test']:.3f}", *cells, *losses])
    rates = ", ".join(f"{row['rate']:g}: {row['validation']:.3f}" for row in found["rates"])
    wide, rank, after = found["wide"], found["rank"], found["steps after"]
    head = ["seed", f"rank {wide}", f"cut to {rank} in weights (lost)", "in outputs (lost)"]
    head += [f"cut before the last {after} steps", f"rank {rank} throughout"]
    return (
        f"SmolLM2-135M, King James, 32 steps of 2; test loss. Rank {wide} at rate {found['rate']:g} (validation loss "
        f"by rate: {rates}), rank {rank} at its own best, 0.002:\n\n{table(head, rows)}"
    )


def extracting() -> str:
    found = result("extracting")
    rows = [["base", "", "", f"{found['base']['test']:.3f}"]]
    rows += [
        [f"rank {row['rank']}", f"{row['numbers']:,}", f"{row['share']:.1%}", f"{row['test']:.3f}"]
        for row in found["ranks"]
    ]
    rows.append(["full fine-tuning", "", "100%", f"{found['full']['test']:.3f}"])
    return (
        f"SmolLM2-135M after {found['steps']} steps of full fine-tuning on the King James Bible (AdamW, "
        f"{found['rate']:g}), extracted in {found['seconds']:.0f} s of one core. "
        "Share of the change's energy, and test loss:\n\n"
        + table(["", "numbers", "share of ‖change‖²", "test loss"], rows)
    )


def quantised_merge() -> str:
    """Divergences by storage and way."""
    storages = result("quantised_merge")["storages"]
    rows = [
        [f"`{kind}`", text, *(f"{row['KL'][text]:.4f}" for row in ways.values())]
        for kind, ways in storages.items()
        for text in next(iter(ways.values()))["KL"]
    ]
    seconds = "; ".join(
        f"{kind}: {ways['merge_quantised, batches']['seconds']:.0f} s" for kind, ways in storages.items()
    )
    ways = list(next(iter(storages.values())))
    return (
        "SmolLM2-135M with an adapter of rank 64 trained on the King James Bible: mean KL from the adapted model in "
        "fp32, nats a token, on held-out verses and on this repository's README. `apart`: the adapter beside a rounded "
        "base; `naive`: added to it and rounded again; `folded`: added to the full-precision base and rounded by the "
        "reader:"
        f"\n\n{table(['storage', 'text', *ways], rows)}\n\n"
        f"With 16 batches of 4 verses, CPU time on one thread: {seconds}."
    )


def routing() -> str:
    """A layer's time over the one without adapters, then a training step's over those apart."""
    found = result("routing")
    rows = [
        [case, *(f"{times[f'{way} over base']['ratio_of_medians']:.2f}" for way in ("mixed", "one", "peft"))]
        for case, times in found["layer"].items()
        if case not in ("machine", "rounds")
    ]
    eight = found["eight"]["8"]
    apart, alone = (
        eight[f"time, together over {what}"] for what in ("the sum of steps apart", "one adapter on the same batch")
    )
    kept = eight["kept for backward, together over one adapter on the same batch"]
    return (
        f"{table(['', '32 rows on 32 adapters', '32 rows on one', 'mixed batch of PEFT'], rows)}\n\n"
        "A training step of SmolLM2-135M in fp32 with eight adapters of rank 8, a row of tokens each, takes "
        f"{apart['ratio_of_medians']:.2f} ({apart['min']:.2f}–{apart['max']:.2f}) of the time of eight steps of a row, "
        f"and {alone['ratio_of_medians']:.2f} ({alone['min']:.2f}–{alone['max']:.2f}) of that of one adapter on the "
        f"same batch; what is kept for the backward pass is {kept:.2f} of the latter's. Largest relative difference of "
        f"a gradient from the steps apart: {eight['largest relative difference of a gradient']:.1g}."
    )


def sweep() -> str:
    found = result("sweep")
    columns = {
        "largest difference of a loss": "{:.1g}",
        "time over the sum of separate runs": "{:.2f}",
        "peak memory over one run's": "{:.2f}",
    }
    rows = [
        [arms, *(shown.format(run[key]) for key, shown in columns.items())] for arms, run in found["sweeps"].items()
    ]
    return (
        f"SmolLM2-135M in fp32, {found['steps']} steps of {found['batch']} sample of {found['length']} tokens, "
        f"{found['rows']} rows a forward, CPU time of one thread from loading the model to the last step:\n\n"
        + table(["arms", *columns], rows)
    )


def ordinary() -> str:
    found = result("ordinary_adapters")
    count, alarms, fit = len(found["adapters"]), found["false alarms"], found["fit"]
    rows = [[f"`{measure}`", f"{low:.2g}", f"{high:.2g}"] for measure, (low, high) in found["bounds"].items()]
    return (
        f"Lowest and highest values over the layers of {count} adapters of as many methods, ranks and rates, on a byte "
        "model and on SmolLM2-135M (benchmarks/ordinary_adapters.py):\n\n"
        f"{table(['measure', 'lowest', 'highest'], rows)}\n\n"
        f"Beside the extremes of all the others, {len(alarms)} of the {count} raise an alarm; LoRA at four times its "
        f"rate does, in {', '.join(found['at four times the rate'])}. `fit` on their own bases: "
        f"{fit['on its base'][0]:.1f} to {fit['on its base'][1]:.1f}; on the same weights in another order of rows and "
        f"columns: {fit['on another'][0]:.1f} to {fit['on another'][1]:.1f}; below 2 a base counts as unrelated."
    )


# Arm of a comparison → the same in the wind tunnel; the heading of each comparison that was run to its end.
ARMS = {
    "LoRA": ("lora", 4),
    "LoRA-GA": ("lora-ga", 4),
    "spectral": ("spectral", 4),
    "full, AdamW": ("full-adamw", 0),
    "LoRA, betas .8, .99": ("lora, betas 0.8 0.99", 4),
    "full, AdamW, betas .8, .99": ("full-adamw, betas 0.8 0.99", 0),
    "full, Muon, momentum .8": ("full-muon, momentum 0.8", 0),
}
COMPARISONS = {
    "kjv": "SmolLM2-135M, King James, rank 8, 32 steps of 2",
    "arithmetic": "SmolLM2-135M, arithmetic, rank 8, 32 steps of 4",
    "python": "SmolLM2-135M, Python's standard library, rank 8, 32 steps of 2",
}
COMPARED = ("LoRA", "LoRA-GA", "spectral", "full, AdamW")


def outcomes() -> dict[str, dict[str, tuple[float, float]]]:
    """Task → arm → mean and deviation of its test losses at its best rate."""
    tasks = {"byte model, Bible → Python, rank 4, 80 steps of 8": {arm: _in_wind_tunnel(arm) for arm in COMPARED}}
    for name, task in COMPARISONS.items():
        tests = {row["arm"]: row["test"] for row in result(f"compare_{name}")["summary"]}
        tasks[task] = {arm: (tests[arm]["mean"], tests[arm]["deviation"]) for arm in COMPARED}
    return tasks


def outcome() -> str:
    rows = [[task, *map(_with_spread, losses.values())] for task, losses in outcomes().items()]
    return table(["test loss, best rate of each, 3 seeds", *COMPARED], rows)


def beyond() -> str:
    """The same of the arms that ran on the byte model alone."""
    return "; ".join(f"{arm}: {_with_spread(_in_wind_tunnel(arm))}" for arm in ARMS if arm not in COMPARED)


def _in_wind_tunnel(arm: str) -> tuple[float, float]:
    method, rank = ARMS[arm]
    runs = result("wind_tunnel")["runs"]
    same = [run for run in runs if (run["method"], run["rank"], run["steps"]) == (method, rank, 80)]
    rate = min((run for run in same if run["seed"] == 0), key=lambda run: run["validation"])["rate"]
    tests = [run["test"] for run in same if run["rate"] == rate]
    return fmean(tests), stdev(tests)


def _with_spread(loss: tuple[float, float]) -> str:
    return f"{loss[0]:.3f} ± {loss[1]:.3f}"


def measured() -> str:
    return "\n\n".join((training_step(), first_step(), starts(), difference_form()))


def rules() -> str:
    rows = [
        [engine.label, rule.about, rule.effect, rule.why, REMEDIES[rule.remedy], f"`{rule.source}`"]
        for engine in ENGINES.values()
        for rule in engine.rules
    ]
    versions = ", ".join(f"{engine.label} {engine.version}" for engine in ENGINES.values())
    head = ["engine", "an adapter with", "as it stands", "because", "export", "read in"]
    return f"Versions: {versions}.\n\n{table(head, rows)}"


def engines() -> str:
    found = result("engines")
    rows = [
        [name, engine, row["form"], f"{row['gap']:.1e}", f"{row['moved']:.1f}"]
        for name, exports in found["adapters"].items()
        for engine, row in exports.items()
    ]
    exported = [row for exports in found["adapters"].values() for row in exports.values()]
    assert all(row.get("greedy text the same", True) for row in exported)  # as the text below says
    head = ["adapter", "engine", "what was written", "largest difference from ours", "the adapter moves them by"]
    return (
        "SmolLM2-135M in fp32, logits of a prompt's tokens; of llama.cpp, log-probabilities of the next token, and its "
        "greedy text is ours. vLLM's and SGLang's files were read by PEFT:\n\n" + table(head, rows)
    )


def serving() -> str:
    found = result("serving")
    faults = found["faults"]
    refused = sum(faults[kind] for kind in ("malformed", "oversized", "unknown", "broken"))
    first, whole = found["seconds_to_first_token"], found["seconds_to_last_token"]
    memory = {time: facts["resident"] / 2**20 for time, facts in found["memory"].items()}
    machine = found["machine"]
    load = machine["load_average"]
    return table(
        [
            "SmolLM2-135M, fp32, one thread of the server's own",
            f"{found['streams']} streams, {found['adapters']} adapters",
        ],
        [
            ["how long", f"{found['seconds'] / 60:.1f} minutes, on {machine['cores']} cores with a load of {load:.0f}"],
            ["answers, of these other than offline", f"{found['answers']}, {len(found['wrong'])}"],
            ["distinct answers of the 20 adapters offline", str(found["distinct_answers"])],
            ["tokens a second", f"{found['tokens_per_second']}"],
            ["seconds to the first token, p50 / p99", f"{first['p50']:.1f} / {first['p99']:.1f}"],
            ["seconds to the last of 12, p50 / p99", f"{whole['p50']:.1f} / {whole['p99']:.1f}"],
            ["adapters loaded, asked and unloaded meanwhile", str(faults["churned"])],
            [
                "malformed, oversized, unknown, broken: refused by name",
                f"{refused}, otherwise {len(found['unexpected'])}",
            ],
            ["clients that vanished; rows left", f"{faults['vanished']}; {sum(found['rows_left'].values()):.0f}"],
            ["the process's memory, before / after", f"{memory['before']:.0f} / {memory['after']:.0f} MiB"],
        ],
    )


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"methods": methods, "outcome": outcome, "beyond": beyond},
    "docs/measured.md": {"measured": measured},
    "docs/examples.md": {"classification": classification},
    "docs/studies.md": {
        "weight-types": lambda: arms("weight_types"),
        "ranks": lambda: arms("ranks"),
        "subspace-ranks": lambda: similarity("ranks"),
        "subspace-seeds": lambda: similarity("seeds"),
        "amplification": amplification,
        "intrinsic": intrinsic,
        "analyze": analyze,
    },
    "docs/adapters.md": {
        "combine": combine,
        "squeezing-smollm2": squeezing_smollm2,
        "extracting": extracting,
        "quantised": quantised,
        "quantised-smollm2": quantised_merge,
        "ordinary": ordinary,
    },
    "docs/coming_from.md": {"other-names": other_names},
    "docs/many_adapters.md": {"routing": routing},
    "docs/sweep.md": {"sweep": sweep},
    "docs/learning_rate.md": {"schedules": probe_schedules, "learning-rate": learning_rates},
    "docs/design.md": {"order": order},
    "docs/export.md": {"rules": rules, "engines": engines},
    "docs/serving.md": {"serving": serving},
    "docs/methods.md": {
        "first-step": first_step,
        "evidence": evidence,
        "dora": dora,
        "wind-tunnel": wind_tunnel,
        "squeezing": squeezing,
    },
}


def filled(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    for name, make in blocks.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
        assert count == 1, f"expected one block {name}, found {count}"
    return text


def texts() -> dict[str, str]:
    """File → what it should hold."""
    pages = {name: filled((ROOT / name).read_text(), blocks) for name, blocks in BLOCKS.items()}
    return pages | {"docs/pictures/outcome.svg": picture("Test loss at each method's best rate: mean ± sd", outcomes())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = {name: text for name, text in texts().items() if not _holds(ROOT / name, text)}
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python scripts/figures.py")
    for name, text in stale.items():
        (ROOT / name).write_text(text)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


if __name__ == "__main__":
    main()
