"""What every benchmark shares: the real model and batches, interleaved timing, results as JSON beside versions."""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on."""
    facts: dict[str, Any] = {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["processor"] = platform.machine()
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    facts["versions"] = {name: version(name) for name in ("rankwise", "torch", "transformers", "peft")}
    return facts


def write(name: str, content: dict[str, Any]) -> None:
    """Keep a result as ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {path}")


def batches(
    count: int = 8, size: int = 4, length: int = 128, *, seed: int = 0, full: bool = False
) -> list[dict[str, Any]]:
    """Tokenised training verses of the built-in data set, labels on the completion only.

    Args:
        full: fill every sequence to ``length`` with verse after verse, as packing does; else one verse, padded.
    """
    from rankwise.train.data.kjv import kjv_records
    from rankwise.train.model.pretrained import load_pretrained

    _, tokenizer = load_pretrained(MODEL)
    records = iter(random.Random(seed).sample(kjv_records(held_out=False), 12 * count * size))
    rows = [_row(tokenizer, records, length, full) for _ in range(count * size)]
    return [_stack(rows[i * size : (i + 1) * size], length, tokenizer.pad_token_id) for i in range(count)]


def _row(tokenizer: Any, records: Any, length: int, full: bool) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    while not ids or (full and len(ids) < length):
        record = next(records)
        prompt = tokenizer(record["prompt"])["input_ids"]
        answer = [*tokenizer(record["completion"])["input_ids"], tokenizer.eos_token_id]
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
    return ids[:length], labels[:length]


def _stack(rows: list[tuple[list[int], list[int]]], length: int, pad: int) -> dict[str, torch.Tensor]:
    def filled(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    return {
        "input_ids": torch.tensor([filled(ids, pad) for ids, _ in rows]),
        "labels": torch.tensor([filled(labels, -100) for _, labels in rows]),
        "attention_mask": torch.tensor([filled([1] * len(ids), 0) for ids, _ in rows]),
    }


def interleaved(
    contenders: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender, in turn: A B C A B C …, so that a drift of the machine meets all alike.

    Args:
        clock: ``time.process_time`` with one thread counts this process's own work, on a machine that others share.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, run in contenders.items():
            start = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(clock() - start)
    return times


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """The ratio of medians and that of minima, and the smallest and largest ratio within one round."""
    each = [n / d for n, d in zip(numerator, denominator, strict=True)]
    return {
        "ratio_of_medians": round(statistics.median(numerator) / statistics.median(denominator), 4),
        "ratio_of_minima": round(min(numerator) / min(denominator), 4),
        "min": round(min(each), 4),
        "max": round(max(each), 4),
    }


def seconds(times: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": round(statistics.median(times), 5), "min": round(min(times), 5), "max": round(max(times), 5)}
