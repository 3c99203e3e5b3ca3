"""Full fine-tuning as a LoRA: SmolLM2-135M tuned on the King James Bible, extracted at ranks 4 to 128.

Full fine-tuning is the comparison's (AdamW at 1e-4 on the weights of all linear layers), with half as many steps again. Both
checkpoints are read from files. A row says how much of the change a rank holds, and the held-out losses with it.

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
from rankwise.train.model.skeleton import locate_files, skeleton
from rankwise.trials.full import FULL
from rankwise.trials.preparing import target_weights, with_full_weights

RATE, STEPS, RANKS = 1e-4, 48, (4, 8, 16, 32, 64, 128)
TUNED = kjv.ADAPTERS / "full"


def fully_tuned(samples: kjv.Data) -> dict[str, float]:
    prepared = with_full_weights(kjv.recipe(learning_rate=RATE, max_steps=STEPS), samples)
    prepared.trainer.optimizer = FULL["adamw"].optimizer(target_weights(prepared.loaded), [], prepared.recipe)
    losses = kjv.judged(kjv.trained(prepared))
    prepared.model.save_pretrained(TUNED)
    return losses


def extracted(prepared: kjv.Prepared, base: Path, rank: int) -> dict[str, Any]:
    began = time.process_time()
    lora = rw.algebra.extract(TUNED, base, rank=rank, layout=skeleton(base))
    seconds = time.process_time() - began
    rw.write(lora.adapter, kjv.ADAPTERS / f"extracted-{rank}")
    row = {"rank": rank, "numbers": lora.parameters, "error": round(lora.error, 4), "seconds": round(seconds, 1)}
    return row | kjv.judged_with(prepared, lora.adapter)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    samples = kjv.data()
    content = {"machine": common.machine(), "rate": RATE, "steps": STEPS, "full": fully_tuned(samples)}
    prepared, base = kjv.untrained(samples), locate_files(common.MODEL)
    content["base"] = kjv.judged(prepared)
    rows: list[dict[str, Any]] = []
    for rank in RANKS:
        rows.append(extracted(prepared, base, rank))
        print(rows[-1], flush=True)
        common.write("extracting", content | {"ranks": rows})


if __name__ == "__main__":
    main()
