"""Random adapters between PEFT and rankwise, both ways, with their counts kept: results/differential.json.

    python benchmarks/differential.py --cases 2000 [--first 0]

The same as tests/parity/test_differential.py, for longer (`make differential`). Two readers that disagree end it, with
the number of the case.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from common import machine, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from differential import DIRECTIONS, TOLERANCE, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    numbers = range(options.first, options.first + options.cases)
    content: dict[str, Any] = {way: dict(sorted(outcomes(way, numbers).items())) for way in DIRECTIONS}
    for way, counts in content.items():
        print(way, counts)
    write("differential", content | {"cases each way": options.cases, "tolerance": TOLERANCE, "machine": machine()})


if __name__ == "__main__":
    main()
