"""Every architecture of transformers, tiny, through an adapter's life: results/zoo.json and docs/structures.md.

    python benchmarks/zoo.py [llama vit ...]     # some architectures: their rows are made anew, the others kept

`make zoo` does all. tests/zoo/test_survey.py runs a few of them.
"""

import argparse
import json
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from common import RESULTS, machine, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo.architectures import names
from zoo.survey import survey

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*")
    chosen = parser.parse_args().architectures
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    earlier = json.loads((RESULTS / "zoo.json").read_text())["rows"] if chosen else []
    rows = {row["name"]: row for row in earlier}
    for name in chosen or names():
        rows[name] = asdict(survey(name))
        print(name, rows[name]["outcome"], rows[name]["why"], flush=True)
    write("zoo", {"rows": [rows[name] for name in sorted(rows)], "machine": machine()})
    subprocess.run([sys.executable, str(ROOT / "scripts" / "structures.py")], check=True)


if __name__ == "__main__":
    main()
