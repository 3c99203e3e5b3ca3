"""Full fine-tuning as a LoRA: SmolLM2-135M tuned on the King James Bible, extracted at ranks 4 to 128.

Full fine-tuning is the comparison's: 32 steps of AdamW at 1e-4 on the weights of all linear layers. Both checkpoints
are read from files. A row says how much of the change's energy a rank holds, and the held-out loss with it.

    python benchmarks/extracting.py
"""

import argparse
import time
from pathlib import Path
from typing import Any

import common
import kjv
import torch

import rankwise as rw
from rankwise.algebra import Approximation
from rankwise.train.model.skeleton import locate_files, skeleton
from rankwise.trials.full import FULL
from rankwise.trials.preparing import target_weights, with_full_weights

RATE, STEPS, RANKS = 1e-4, 32, (4, 8, 16, 32, 64, 128)
TUNED = kjv.ADAPTERS / "full"


def fully_tuned(samples: kjv.Data) -> dict[str, float]:
    prepared = with_full_weights(kjv.recipe(learning_rate=RATE, max_steps=STEPS), samples)
    prepared.trainer.optimizer = FULL["adamw"].optimizer(target_weights(prepared.loaded), [], prepared.recipe)
    losses = kjv.judged(kjv.trained(prepared), "test")
    prepared.model.save_pretrained(TUNED)
    return losses


def extracted(base: Path) -> tuple[Approximation, float]:
    """At the largest rank, and the seconds that it takes."""
    began = time.process_time()
    lora = rw.algebra.extract(TUNED, base, rank=max(RANKS), layout=skeleton(base))
    return lora, round(time.process_time() - began, 1)


def cut(prepared: kjv.Prepared, lora: Approximation, rank: int) -> dict[str, Any]:
    """The nearest of a rank: that of the nearest of the largest, whose errors are at right angles to what it holds."""
    narrow = rw.algebra.squeeze(lora.adapter, rank=rank)
    rw.write(narrow.adapter, kjv.ADAPTERS / f"extracted-{rank}")
    share = (1 - lora.error**2) * (1 - narrow.error**2)
    row = {"rank": rank, "numbers": narrow.parameters, "share": round(share, 4)}
    return row | kjv.judged_with(prepared, narrow.adapter)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    samples = kjv.data()
    content = {"machine": common.machine(), "rate": RATE, "steps": STEPS, "full": fully_tuned(samples)}
    prepared, base = kjv.untrained(samples), locate_files(common.MODEL)
    content["base"] = kjv.judged(prepared, "test")
    lora, content["seconds"] = extracted(base)
    rows: list[dict[str, Any]] = []
    for rank in RANKS:
        rows.append(cut(prepared, lora, rank))
        print(rows[-1], flush=True)
        common.write("extracting", content | {"ranks": rows})


if __name__ == "__main__":
    main()
