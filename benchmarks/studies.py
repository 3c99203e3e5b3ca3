"""The five studies on SmolLM2-135M and the demo's data: results, and the pictures of docs/studies.md.

    python benchmarks/studies.py [--directory studies] [--only ranks subspace] [--threads 1]

Training runs are kept in the directory, so it can be stopped and goes on.
"""

import argparse
import json
from pathlib import Path

import torch
import trl.trainer.utils
from rich.console import Console

from rankwise.report.drawing import standalone
from rankwise.studies import STUDIES, Outcome, run_study, write_outcome
from rankwise.train import recipe

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"

# A third of the demo's tokens a run, as there are about ninety of them.
COMMON = {
    "model": "smollm2-135m",
    "data": "kjv",
    "max_train_samples": 2000,
    "max_eval_samples": 24,
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "max_steps": 24,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "logging_steps": 4,
    "rank": 10,  # so that one budget divides evenly over q, k, v and o
    "alpha": 16.0,
    "learning_rate": 4e-3,
}
TARGETS = {name: "all-linear" if name == "intrinsic-dimension" else ["q_proj", "v_proj"] for name in STUDIES}
TARGETS["weight-types"] = "all-linear"  # what it adapts instead is its question


def save_pictures(name: str, outcome: Outcome) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    drawn = [panel.svg for panel in outcome.panels if panel.svg]
    for number, drawing in enumerate(drawn, 1):
        (PICTURES / f"{name}-{number}.svg").write_text(standalone(drawing))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("studies"))
    parser.add_argument("--only", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # TRL scores only the trained tokens on a GPU, but every token on a CPU: the same loss, a quarter slower.
    trl.trainer.utils._use_triton = lambda device: True
    for name in options.only:
        wanted = recipe.parse(COMMON | {"target_modules": TARGETS[name]})
        outcome = run_study(name, wanted, options.directory, options.seeds, Console(width=140))
        page = write_outcome(name, outcome, wanted, options.seeds, options.directory)
        found = json.loads(page.with_suffix(".json").read_text())
        (RESULTS / f"study_{name.replace('-', '_')}.json").write_text(json.dumps(found, indent=1) + "\n")
        save_pictures(name, outcome)
        print(name, page, flush=True)


if __name__ == "__main__":
    main()
