"""Rows of one batch with adapters of their own: what a layer, a training step and a thousand adapters cost.

    python benchmarks/routing.py [layer] [eight] [training] [many] [--rounds 9]

layer: one linear layer of 2048 × 2048 in inference, 32 rows on 32 adapters of rank 8, over the same layer without any;
PEFT's mixed batch beside it. training: SmolLM2-135M in fp32, N adapters of rank 8 with one row of 64 tokens each in one
step, beside N steps of one row each, and a step of one adapter on all rows. many: a thousand adapters on one small
model. Times are the process's CPU time with one thread, memory the bytes that autograd keeps between forward and
backward; with more threads it is the clock on the wall. Contenders run in turn; the ratios are of medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import RESULTS, batches, interleaved, machine, ratio, write
from torch import Tensor, nn

import rankwise as rw

ROWS, RANK, WIDTH = 32, 8, 2048
NAMES = [f"adapter{number}" for number in range(ROWS)]


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _drawn(model: nn.Module) -> None:
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.normal_(std=0.02)


def _ours(base: Layer, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = Layer(dtype)
    model.load_state_dict(base.state_dict())
    for name in NAMES:
        rw.attach(model, rw.LoRA(rank=RANK, target_modules=["layer"]), name=name)
    _drawn(model)
    return model.eval()


def _peft(base: Layer, dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = Layer(dtype)
    model.load_state_dict(base.state_dict())
    config = LoraConfig(r=RANK, target_modules=["layer"])
    wrapped = get_peft_model(model, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        wrapped.add_adapter(name, config)
    _drawn(wrapped)
    return wrapped.eval()


def layer(rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        base = Layer(dtype)
        ours, theirs = _ours(base, dtype), _peft(base, dtype)
        for tokens in (1, 16, 64):
            x = torch.randn(ROWS, tokens, WIDTH, dtype=dtype)
            calls = 40 if tokens == 1 else 4
            result[f"{dtype}, {tokens} tokens a row".removeprefix("torch.")] = _layer(
                base, ours, theirs, x, calls, rounds, clock
            )
    return result


def _layer(
    base: nn.Module, ours: nn.Module, theirs: nn.Module, x: Tensor, calls: int, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    def routed(rows: list[str]) -> Callable[[], None]:
        def run() -> None:
            with rw.route(ours, rows):
                for _ in range(calls):
                    ours(x)

        return run

    def plain() -> None:
        for _ in range(calls):
            base(x)

    def peft() -> None:
        for _ in range(calls):
            theirs(x, adapter_names=NAMES)

    with torch.no_grad():
        contenders = {"base": plain, "mixed": routed(NAMES), "one": routed(NAMES[:1] * ROWS), "peft": peft}
        times = interleaved(contenders, rounds, clock=clock)
    over = {f"{name} over base": ratio(times[name], times["base"]) for name in ("mixed", "one", "peft")}
    print(tuple(x.shape), x.dtype, {k: v["ratio_of_medians"] for k, v in over.items()}, flush=True)
    return over


class Kept:
    """The bytes that autograd keeps for the backward pass, each memory counted once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def kept_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        output = run()
    del output
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in kept.sizes.items() if pointer not in own)


def training(rounds: int, clock: Callable[[], float], counts: Sequence[int] = (1, 4, 8, 16)) -> dict[str, Any]:
    from rankwise.train.model.pretrained import load_pretrained

    return {str(count): _training(load_pretrained("smollm2-135m")[0], count, rounds, clock) for count in counts}


def eight(rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Training with eight adapters alone, which takes minutes where the whole takes an hour."""
    return training(rounds, clock, [8])


def _training(model: Any, count: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    names = NAMES[:count]
    for name in names:
        rw.attach(model, rw.LoRA(rank=RANK, alpha=16), name=name)
    model.train()
    (batch,) = batches(1, count, 64, full=True)
    batch["labels"] = batch["input_ids"]  # no row is without a token to learn
    rows = [{key: x[i : i + 1] for key, x in batch.items()} for i in range(count)]
    with rw.route(model, names):  # all are trained from here on
        pass
    _drawn(model)

    def losses() -> Tensor:
        """The sum of the rows' own mean losses."""
        with rw.route(model, names):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        parts = zip(logits, batch["labels"], strict=True)
        return torch.stack([nn.functional.cross_entropy(row[:-1], labels[1:]) for row, labels in parts]).sum()

    def together() -> None:
        losses().backward()

    def apart() -> None:
        for name, row in zip(names, rows, strict=True):
            rw.activate(model, name)
            model(**row).loss.backward()

    def one() -> Tensor:
        rw.activate(model, names[0])
        loss: Tensor = model(**batch).loss
        return loss

    gradients = []
    for step in (apart, together):
        step()
        gradients.append({p: x.grad for p, x in model.named_parameters() if x.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == count * 2 * 210
    gaps = torch.stack([(gradients[1][p] - g).norm() / g.norm() for p, g in gradients[0].items()])
    assert gaps.isfinite().all()
    memory = kept_bytes(losses, model) / kept_bytes(one, model)
    contenders = {"together": together, "apart": apart, "one": lambda: one().backward()}
    times = interleaved(contenders, rounds, clock=clock)
    result = {
        "largest relative difference of a gradient": float(gaps.max()),
        "kept for backward, together over one adapter on the same batch": round(memory, 4),
        "time, together over the sum of steps apart": ratio(times["together"], times["apart"]),
        "time, together over one adapter on the same batch": ratio(times["together"], times["one"]),
    }
    print(count, result, flush=True)
    return result


def many(rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds an adapter, of attaching so many, and of a block with eight of them around a forward."""
    result: dict[str, Any] = {}
    for count in (10, 250, 500, 1000):  # the first warms up
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
        names = [f"adapter{number}" for number in range(count)]
        start = time.process_time()
        for name in names:
            rw.attach(model, rw.LoRA(rank=1, target_modules=r"\d+"), name=name)
        attach = (time.process_time() - start) / count
        x, step = torch.randn(8, 64), max(count // 8, 1)
        route = []
        for shift in range(min(step, 50)):
            start = time.process_time()
            with torch.no_grad(), rw.route(model, names[shift::step][:8]):
                model(x)
            route.append(time.process_time() - start)
        result[str(count)] = {"attach": round(attach, 6), "route of 8 and a forward": statistics.median(route)}
        print(count, result[str(count)], flush=True)
    return result


PARTS = {"layer": layer, "eight": eight, "training": training, "many": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=["layer", "training", "many"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    path = RESULTS / "routing.json"
    result = json.loads(path.read_text()) if path.exists() else {"what": __doc__}
    for part in arguments.parts:
        key = part if arguments.threads == 1 else f"{part}, {arguments.threads} threads"
        result[key] = {"machine": machine(), "rounds": arguments.rounds, **PARTS[part](arguments.rounds, clock)}
        write("routing", result)


if __name__ == "__main__":
    main()
