"""Coverage-guided fuzzing of the checkpoint reader, with its figures kept.

python benchmarks/fuzz.py [--seconds 300]
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, write

PROGRAM = Path(__file__).parents[1] / "tests" / "fuzz" / "fuzz_checkpoint.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(PROGRAM), "corpus", f"-max_total_time={seconds}"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        findings = [p.name for p in Path(directory).iterdir() if p.name.startswith(("crash-", "timeout-", "oom-"))]
        reached = len(list((Path(directory) / "corpus").iterdir()))
    tried = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
    if tried is None:
        sys.exit(done.stderr[-3000:])
    write(
        "fuzz",
        {
            "inputs tried": int(tried[1]),
            "seconds": int(tried[2]),
            "inputs that reach new code": reached,
            "inputs that end in anything but a named error": len(findings),
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    main()
