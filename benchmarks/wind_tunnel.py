"""A wind tunnel for methods of fine-tuning: a byte model of 0.9 M parameters, ten seconds a run, every rate tuned.

The model is pre-trained on the World English Bible and fine-tuned on Python's standard library, 80 steps of 8 × 96
bytes, all linear layers. Each method's rate is found by bracketing on its own ladder of factors of two, on the
validation part with seed 0; then it runs at that rate with three seeds, and the loss on the test part is reported. The
parts are whole files. All rates decay linearly to zero.

    python benchmarks/wind_tunnel.py                                    # all that is not in the results yet
    python benchmarks/wind_tunnel.py --methods spectral polora --ranks 4 16 --seeds 0 1 2
    python benchmarks/wind_tunnel.py --methods spectral --shorter    # steps to LoRA's loss, on shorter schedules

A new method is one row of METHODS. Runs are kept in results/wind_tunnel.json, pre-trained weights in build/.
"""

import argparse
import hashlib
import json
import math
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw
from rankwise.methods import resolve
from rankwise.optim import OPTIMIZERS
from rankwise.optim.spectral import Spectral
from rankwise.reshaping import restart

RESULTS = Path(__file__).parent / "results" / "wind_tunnel.json"
BUILD = Path(__file__).parents[1] / "build"
STEPS, BATCH, LENGTH = 80, 8, 96
WIDTH, HIDDEN, LAYERS, HEADS = 128, 384, 4, 4

# --- the model -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention with rotary positions and SwiGLU, behind RMS norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(rotated(q, turns), rotated(k, turns), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turns
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class ByteModel(nn.Module):
    """Predicts the next byte. The head shares the embedding's weight, so that "all-linear" leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=WIDTH**-0.5 / 2)

    def forward(self, tokens: Tensor) -> Tensor:
        half = WIDTH // HEADS // 2
        angles = torch.arange(tokens.shape[1])[:, None] * 1000.0 ** (-torch.arange(half) / half)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()))
        return self.head(self.norm(x))


def loss_of(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte; ``window`` is [n, length + 1]."""
    logits = model(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


# --- texts -----------------------------------------------------------------------------------------------------------


def as_bytes(texts: Iterable[str]) -> Tensor:
    return torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8).long()


def bible() -> Tensor:
    from rankwise.train.data.kjv import kjv_records

    verses = (record["prompt"].split("\n\n")[1] for record in kjv_records(held_out=False))
    return as_bytes(verses)


def python_sources() -> dict[str, Tensor]:
    """The standard library's modules, whole files dealt to three parts."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    parts = {"validation": files[:24], "test": files[24:48], "train": files[48:]}
    return {part: as_bytes(file.read_text(encoding="utf-8") for file in chosen) for part, chosen in parts.items()}


def windows(text: Tensor, count: int, generator: torch.Generator, length: int = LENGTH) -> Tensor:
    starts = torch.randint(len(text) - length - 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length + 1)]


def pretrained(steps: int = 700, rate: float = 4e-3) -> ByteModel:
    """The model after one pre-training, kept in build/."""
    recipe = f"{WIDTH} {HIDDEN} {LAYERS} {HEADS} {steps} {rate}"
    path = BUILD / f"wind_tunnel_{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.pt"
    torch.manual_seed(0)
    model = ByteModel()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    text, generator = bible(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(steps):
        loss = descend(model, optimizer, windows(text, 16, generator), min(1.0, step / 50, (steps - step) / 500))
        if step % 100 == 0:
            print(f"pre-training {step}/{steps}: {loss:.3f}", flush=True)
    BUILD.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


# --- optimizers ------------------------------------------------------------------------------------------------------


Build = Callable[[nn.Module, float], torch.optim.Optimizer]


def linear_weights(model: nn.Module) -> list[Tensor]:
    """What "all-linear" adapts: full fine-tuning trains the same, unless it is said to train everything."""
    return [model.get_submodule(site.name).weight for site in rw.plan(model, rw.LoRA(rank=1))]


def full_adamw(betas: tuple[float, float] = (0.9, 0.999)) -> Build:
    return lambda model, rate: torch.optim.AdamW(linear_weights(model), rate, betas, weight_decay=0.0)


def everything_adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)


def full_muon(momentum: float) -> Build:
    return lambda model, rate: torch.optim.Muon(linear_weights(model), rate, weight_decay=0.0, momentum=momentum)


def adamw(ratio: float = 1.0, betas: tuple[float, float] = (0.9, 0.999)) -> Build:
    return lambda model, rate: torch.optim.AdamW(
        rw.param_groups(model, lr=rate, lr_ratio=ratio), rate, betas, weight_decay=0.0
    )


def from_table(name: str) -> Build:
    """An optimizer of the library, as a recipe names it."""
    return lambda model, rate: resolve(OPTIMIZERS, name, "optimizer")(model, rate)


# What a rate of 1 is, in the spectral norm of a step in W.
UNITS: dict[str, Callable[[Tensor], float]] = {
    "norm": lambda W: float(torch.linalg.matrix_norm(W, 2)),
    "rms": lambda W: float(W.norm()) / min(W.shape) ** 0.5,
    "shape": lambda W: (W.shape[0] / W.shape[1]) ** 0.5,
    "elements": lambda W: max(W.shape) ** 0.5,
}


class SpectralInUnits(Spectral):
    """The spectral step with a rate in units of each weight."""

    def __init__(self, model: nn.Module, lr: float, unit: str) -> None:
        super().__init__(rw.pairs(model), lr)
        weights = {pair.name: model.get_submodule(pair.name).weight.detach().float() for pair in self.pairs}
        self.units = {name: UNITS[unit](weight) for name, weight in weights.items()}

    def options(self, stack: Sequence[rw.Pair]) -> dict[str, Any]:
        return {**super().options(stack), "unit": torch.tensor([self.units[pair.name] for pair in stack])}


def spectral_in(unit: str) -> Build:
    return lambda model, rate: SpectralInUnits(model, rate, unit)


# --- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One contender.

    Attributes:
        optimizer: (model, rate) → optimizer. rate: where its ladder of factors of two begins.
        adapter: options of rw.LoRA; None for full fine-tuning.
        ranks: what is run by default.
        restart_every: steps after which the pairs start anew on top of what they learnt, as in a recipe.
    """

    optimizer: Build
    rate: float
    adapter: dict[str, Any] | None = field(default_factory=dict)
    ranks: tuple[int, ...] = (4,)
    restart_every: int | None = None


ALL_RANKS = (1, 4, 16, 64)
QUICK = (0.8, 0.99)  # for so short a run; torch's own (0.9, 0.999) is behind for full fine-tuning and LoRA alike
LORA_GA = {"init": "lora-ga", "scaling": "rslora"}
METHODS = {
    "full-adamw": Method(full_adamw(), 2e-3, None, (0,)),
    "full-adamw, betas 0.8 0.99": Method(full_adamw(QUICK), 2e-3, None, (0,)),
    "full-adamw, embedding and norms too": Method(everything_adamw, 2e-3, None, (0,)),
    "full-muon": Method(full_muon(0.95), 0.05, None, (0,)),
    "full-muon, momentum 0.8": Method(full_muon(0.8), 0.05, None, (0,)),
    "lora": Method(adamw(), 1e-2, ranks=ALL_RANKS),
    "lora, betas 0.8 0.99": Method(adamw(betas=QUICK), 1e-2),
    "lora-plus": Method(adamw(16.0), 1e-3),
    "rslora": Method(adamw(), 5e-3, {"scaling": "rslora"}, (4, 16)),
    "pissa": Method(adamw(), 2e-3, {"init": "pissa"}),
    "lora-ga": Method(adamw(), 2e-3, LORA_GA),
    "lora-pro": Method(from_table("lora-pro"), 1e-3),
    "scaled-adam": Method(from_table("scaled-adam"), 2e-3),
    "loft": Method(from_table("loft"), 2e-3),
    "lora-muon": Method(from_table("lora-muon"), 0.2, ranks=ALL_RANKS),
    "polora": Method(from_table("polora"), 0.4, ranks=ALL_RANKS),
    "spectral": Method(from_table("spectral"), 0.1, ranks=ALL_RANKS),
    **{f"spectral, unit {unit}": Method(spectral_in(unit), 0.1) for unit in ("shape", "rms")},
    "spectral, unit norm": Method(spectral_in("norm"), 0.05),
    "spectral, unit elements": Method(spectral_in("elements"), 0.015),
    "spectral from lora-ga": Method(from_table("spectral"), 0.1, LORA_GA),
    "lora, betas 0.8 0.99, restarts": Method(adamw(betas=QUICK), 1e-2, restart_every=20),
    "lora-ga, restarts": Method(adamw(), 2e-3, LORA_GA, restart_every=20),
    "spectral, restarts": Method(from_table("spectral"), 0.2, restart_every=20),
}


# --- one run ---------------------------------------------------------------------------------------------------------


def forget_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for pair in rw.pairs(model):
        for parameter in pair.parameters:
            optimizer.state.pop(parameter, None)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, window: Tensor, share: float) -> float:
    """One step at this share of the rate that the optimizer was built with; the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak", group["lr"]) * share
    optimizer.zero_grad()
    loss = loss_of(model, window)
    loss.backward()
    optimizer.step()
    return loss.item()


class Tunnel:
    """Runs methods from the pre-trained model, and keeps what they came to."""

    def __init__(self, results: Path = RESULTS) -> None:
        self.results = results
        self.runs: list[dict[str, Any]] = json.loads(results.read_text())["runs"] if results.exists() else []
        self.weights = pretrained().state_dict()
        self.texts = python_sources()
        fixed = torch.Generator().manual_seed(1)
        self.held_out = {part: windows(self.texts[part], 192, fixed) for part in ("validation", "test")}

    def run(self, name: str, method: Method, rank: int, rate: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
        """A run's losses, from the results or made now."""
        key = {"method": name, "rank": rank, "rate": rate, "seed": seed, "steps": steps}
        for done in self.runs:
            if all(done[field] == value for field, value in key.items()):
                return done
        start = time.process_time()
        losses = self._losses(method, rank, rate, seed, steps)
        run = {**key, **losses, "seconds": round(time.process_time() - start, 2)}
        print(json.dumps(run), flush=True)
        self.runs.append(run)
        self.save()
        return run

    def batch(self, generator: torch.Generator) -> Tensor:
        """The next of the training batches that a generator draws."""
        return windows(self.texts["train"], BATCH, generator)

    def _losses(self, method: Method, rank: int, rate: float, seed: int, steps: int) -> dict[str, float]:
        model, generator = self.started(method, rank, seed)
        optimizer = method.optimizer(model, rate)
        for step in range(steps):
            loss = descend(model, optimizer, self.batch(generator), 1 - step / steps)
            if not loss < 20:
                return {"validation": math.inf, "test": math.inf}
            done = step + 1
            if method.restart_every is not None and done % method.restart_every == 0 and done < steps:
                optimizer.zero_grad()
                restart(model, self.batches_to_come(generator), loss_of, seed=seed + 1000 * done)
                forget_moments(optimizer, model)
        return self.judged(model)

    def started(self, method: Method, rank: int, seed: int) -> tuple[ByteModel, torch.Generator]:
        """The pre-trained model with the method's adapter, and what draws its training batches."""
        model, generator = ByteModel(), torch.Generator().manual_seed(seed)
        model.load_state_dict(self.weights)
        if method.adapter is not None:
            needs = {"batches": self.batches_to_come(generator), "loss": loss_of}
            rw.attach(model, rw.LoRA(rank=rank, seed=seed, **method.adapter), **needs)
        return model, generator

    def batches_to_come(self, generator: torch.Generator) -> list[Tensor]:
        """The next eight training batches, which the generator will give again."""
        same = torch.Generator()
        same.set_state(generator.get_state())
        return [self.batch(same) for _ in range(8)]

    @torch.no_grad()
    def judged(self, model: nn.Module) -> dict[str, float]:
        """The loss on each held-out part."""
        return {part: round(loss_of(model, window).item(), 4) for part, window in self.held_out.items()}

    def best_rate(self, name: str, method: Method, rank: int) -> float:
        """The rate with the lowest validation loss on seed 0, with a worse one on either side."""

        def validation(rung: int) -> float:
            return self.run(name, method, rank, method.rate * 2.0**rung, seed=0)["validation"]

        best = 0
        while True:
            better = min((best - 1, best, best + 1), key=validation)
            if better == best:
                return method.rate * 2.0**best
            best = better

    def save(self) -> None:
        facts = {
            "python": sysconfig.get_python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        lines = ",\n".join("  " + json.dumps(run) for run in self.runs)
        text = f'{{"machine": {json.dumps(facts)},\n "runs": [\n{lines}\n]}}\n'
        temporary = self.results.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(self.results)

    def shortest(self, name: str, method: Method, rank: int, rate: float, goal: float) -> float:
        """The smallest share of the steps, in tenths, that reaches a validation loss on a schedule of that length."""
        for tenths in range(9, 1, -1):
            run = self.run(name, method, rank, rate, seed=0, steps=STEPS * tenths // 10)
            if run["validation"] > goal:
                return (tenths + 1) / 10
        return 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, help="default: those of each method's row")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shorter", action="store_true", help="also find the steps that reach LoRA's loss at r = 4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tunnel = Tunnel()
    print(f"{'method':36} {'rank':>4} {'rate':>8} {'validation':>10} {'test':>8} {'sd':>7} {'seconds':>7} {'steps':>6}")
    goal = None
    if options.shorter:
        lora = METHODS["lora"]
        goal = tunnel.run("lora", lora, 4, tunnel.best_rate("lora", lora, 4), 0)["validation"]
    rows = []
    for name in options.methods:
        method = METHODS[name]
        for rank in method.ranks if options.ranks is None or method.adapter is None else options.ranks:
            rate = tunnel.best_rate(name, method, rank)
            runs = [tunnel.run(name, method, rank, rate, seed) for seed in options.seeds]
            share = f"{tunnel.shortest(name, method, rank, rate, goal):.1f}" if goal is not None else ""
            rows.append(row(name, rank, rate, runs, share))
    print("\n".join(rows))


def row(name: str, rank: int, rate: float, runs: list[dict[str, Any]], share: str) -> str:
    validation, test, seconds = ([run[field] for run in runs] for field in ("validation", "test", "seconds"))
    spread = statistics.stdev(test) if len(test) > 1 else 0.0
    return (
        f"{name:36} {rank or 'full':>4} {rate:8.3g} {statistics.mean(validation):10.4f} {statistics.mean(test):8.4f} "
        f"{spread:7.4f} {statistics.median(seconds):7.1f} {share:>6}"
    )


if __name__ == "__main__":
    main()
