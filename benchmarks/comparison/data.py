"""Writes the samples of the comparisons that are not built in: build/comparison/{arithmetic,python}-{train,test}.jsonl.

Arithmetic is reasoning-gym's (`pip install reasoning-gym`), eight kinds of tasks with exact answers; Python is the
standard library's own source, with whole modules held out. Both are the same on every machine for the same versions.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("build/comparison")
TASKS = (
    *("chain_sum", "basic_arithmetic", "calendar_arithmetic", "simple_equations"),
    *("time_intervals", "number_format", "fraction_simplification", "leg_counting"),
)
TRAIN_SAMPLES, TEST_SAMPLES = 2000, 400
LINES = 14  # about as many tokens as the recipe's max_length


def arithmetic(size: int, seed: int) -> Iterator[dict[str, str]]:
    """Questions with their answers, the tasks in turn."""
    import reasoning_gym

    each = size // len(TASKS)
    columns = [reasoning_gym.create_dataset(task, size=each, seed=seed) for task in TASKS]
    for samples in zip(*columns, strict=True):
        for sample in samples:
            yield {"prompt": f"{sample['question'].strip()}\nAnswer:", "completion": f" {sample['answer']}"}


def python(*, held_out: bool) -> Iterator[dict[str, str]]:
    """Pieces of the standard library; one module in ten is held out, by a hash of its name."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if (hashlib.sha256(path.name.encode()).digest()[0] < 26) != held_out:
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for first in range(0, len(lines) - LINES, LINES):
            yield {"text": "".join(lines[first : first + LINES])}


def write(name: str, records: Iterator[dict[str, str]]) -> None:
    path = FOLDER / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    write("python-train", python(held_out=False))
    write("python-test", python(held_out=True))
    write("arithmetic-train", arithmetic(TRAIN_SAMPLES, seed=1))
    write("arithmetic-test", arithmetic(TEST_SAMPLES, seed=2))
