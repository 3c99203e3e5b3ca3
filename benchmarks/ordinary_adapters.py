"""Adapters of 12 steps by several methods and rates on SmolLM2-135M, for what `rankwise inspect --deep` calls ordinary.

python benchmarks/ordinary_adapters.py
"""

import argparse
from typing import Any

import kjv
import torch

import rankwise as rw
from rankwise.trials.preparing import with_adapter

# Rates from too low to too high; the best are 2e-3 for LoRA and 1e-4 for LoRA-GA.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora-2e-3": {"learning_rate": 2e-3},
    "dora-2e-3": {"variant": "dora", "learning_rate": 2e-3},
    "lora-ga-1e-4": {"init": "lora-ga", "scaling": "rslora", "learning_rate": 1e-4, "init_batches": 4},
    "spectral-1e-2": {"optimizer": "spectral", "learning_rate": 1e-2},
    "pissa-5e-4": {"init": "pissa", "learning_rate": 5e-4},
    "lora-8e-3": {"learning_rate": 8e-3},
    "attention-2e-3": {"target_modules": ["q_proj", "v_proj"], "learning_rate": 2e-3},
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    samples = kjv.data()
    for name, changes in ADAPTERS.items():
        if not (kjv.ADAPTERS / name).is_dir():
            prepared = kjv.trained(with_adapter(kjv.recipe(max_steps=12, **changes), samples))
            rw.save(prepared.model, kjv.ADAPTERS / name)
            print(name, flush=True)


if __name__ == "__main__":
    main()
