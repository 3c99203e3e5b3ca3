"""DoRA's cost beside PEFT's: one layer, and a whole training step of SmolLM2-135M.

    python benchmarks/dora_layer.py [--clock cpu] [--threads 1] [--rounds 15] [--step-rounds 4]

Contenders take turns in one process (A B C A B C …). The floor is the frozen layer or model: its forward and its
backward to the input. Times are medians; a ratio is of medians, its range the least and greatest of the rounds' own
ratios. The clock is the process's CPU time (with one thread: the wall time of a machine that does nothing else), or the
wall with ``--clock wall``. That both libraries compute the same, gradients included, is checked first.
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.train.model.pretrained import load_pretrained

RANK, ALPHA, WIDTH = 8, 16, 1024
RESULTS = Path(__file__).with_name("results") / "dora_layer.json"
Run = Callable[[], Any]


CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
clock = CLOCKS["cpu"]


def interleaved(contenders: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after a warm-up of two."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 2):
        for name, run in contenders.items():
            start = clock()
            run()
            if i >= 2:
                seconds[name].append(clock() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(above, below, strict=True)]
    of_medians = statistics.median(above) / statistics.median(below)
    return {"ratio": round(of_medians, 3), "min": round(min(each), 3), "max": round(max(each), 3)}


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "milliseconds": {name: round(1e3 * statistics.median(times), 3) for name, times in seconds.items()},
        "peft_over_rankwise": ratio(seconds["peft"], seconds["rankwise"]),
        "rankwise_over_floor": ratio(seconds["rankwise"], seconds["floor"]),
        "peft_over_floor": ratio(seconds["peft"], seconds["floor"]),
        **({"lora_over_floor": ratio(seconds["lora"], seconds["floor"])} if "lora" in seconds else {}),
    }


def peft_dora(model: nn.Module, targets: str | list[str], dropout: float) -> Any:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=True, lora_dropout=dropout, init_lora_weights=True
    )
    return peft.get_peft_model(model, config)


def start_alike(model: nn.Module, seed: int = 0) -> None:
    """The same adapter in either library: tensors drawn in the model's order, A before B, magnitudes as they are."""
    generator = torch.Generator().manual_seed(seed)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "magnitude" not in n]
    for letter in "AB":
        for name, parameter in named:
            if f"lora_{letter}" in name:
                noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.data.copy_(noise if letter == "A" else 0.02 * noise)


def gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for kind in ("lora_A", "lora_B", "magnitude"):
        found += [p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None and kind in n]
    return found


def check_same(ours: nn.Module, theirs: nn.Module, run: Callable[[nn.Module], Any], limit: float) -> float:
    """The largest relative difference of any gradient; each must be non-zero."""
    for model in (ours, theirs):
        run(model)
    pairs = list(zip(gradients(ours), gradients(theirs), strict=True))
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert all(float(b.norm()) > 0 for _, b in pairs) and worst < limit, f"gradients differ by {worst:.1e}"
    for model in (ours, theirs):
        model.zero_grad()
    return worst


def layer_case(dtype: torch.dtype, tokens: int, dropout: float, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(dtype).requires_grad_(False)
    spec = rw.LoRA(rank=RANK, alpha=ALPHA, dropout=dropout)
    models = {
        "floor": base,
        "lora": rw.attach(deepcopy(base), spec),
        "rankwise": rw.attach(deepcopy(base), rw.LoRA.from_dict(spec.to_dict() | {"variant": "dora"})),
        "peft": peft_dora(deepcopy(base), ["0"], dropout),
    }
    for name in ("rankwise", "peft"):
        start_alike(models[name])
    x, grad = torch.randn(tokens, WIDTH, dtype=dtype), torch.randn(tokens, WIDTH, dtype=dtype)

    def run(model: nn.Module) -> None:
        model(x.detach().requires_grad_()).backward(grad)

    def timed(model: nn.Module) -> Run:
        def once() -> None:
            run(model)
            model.zero_grad()

        return once

    for model in models.values():
        model.eval()  # without dropout, which the two define differently, for the check
    gap = check_same(models["rankwise"], models["peft"], run, 1e-4 if dtype == torch.float32 else 0.05)
    for model in models.values():
        model.train()
    seconds = interleaved({name: timed(model) for name, model in models.items()}, rounds)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "dropout": dropout,
        "gradients_differ_by": gap,
        **summary(seconds),
    }


def smollm2_step(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Forward, backward and AdamW on every linear layer but the head, batch 4 × 128."""
    base, _ = load_pretrained("smollm2-135m", dtype=dtype)
    base.config.use_cache = False
    base.requires_grad_(False)
    ids = torch.randint(0, base.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    targets = "all-linear"
    models = {
        "floor": base,
        "lora": rw.attach(deepcopy(base), rw.LoRA(rank=RANK, alpha=ALPHA)),
        "rankwise": rw.attach(deepcopy(base), rw.LoRA(rank=RANK, alpha=ALPHA, variant="dora")),
        "peft": peft_dora(deepcopy(base), targets, 0.0),
    }
    for name in ("rankwise", "peft"):
        start_alike(models[name])

    def run(model: nn.Module) -> None:
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()

    def timed(model: nn.Module) -> Run:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

        def once() -> None:
            run(model)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return once

    for model in models.values():
        model.train()
    gap = check_same(models["rankwise"], models["peft"], run, 1e-2 if dtype == torch.float32 else 0.5)
    seconds = interleaved({name: timed(model) for name, model in models.items()}, rounds)
    return {
        "model": "SmolLM2-135M, batch 4 × 128, rank 8, all-linear, forward + backward + AdamW",
        "dtype": str(dtype).removeprefix("torch."),
        "gradients_differ_by": gap,
        **summary(seconds),
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("rankwise", "torch", "peft", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step-rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    global clock
    clock = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {
        "machine": {**machine(), "clock": options.clock},
        "layer": f"Linear {WIDTH} × {WIDTH}, rank {RANK}",
        "layers": [],
    }
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (512, 64):
            for dropout in (0.0, 0.1):
                results["layers"].append(layer_case(dtype, tokens, dropout, options.rounds))
                print(json.dumps(results["layers"][-1]), flush=True)
    if options.step_rounds:
        results["step"] = smollm2_step(torch.float32, options.step_rounds)
        print(json.dumps(results["step"]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
