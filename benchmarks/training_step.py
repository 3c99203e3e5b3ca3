"""A LoRA training step on SmolLM2-135M (batch 4 × 128, r = 8, all-linear) beside PEFT's, as a ratio to the floor.

    python benchmarks/training_step.py [--rounds 9] [--threads 1] [--only "float32, dropout 0.0"]

The floor is the frozen model's forward and the backward to its input embeddings. A step is forward + backward; the
optimizer's own time is the same for all. Also: attach, save, load, merge + restore.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import MODEL, RESULTS, batches, interleaved, machine, ratio, seconds, write
from peft import LoraConfig, PeftModel, get_peft_model

import rankwise as rw
from rankwise.train.model.pretrained import load_pretrained

# On a CPU the process's own time: others on the machine do not count, and with one thread it is what a step takes.
CLOCK = {"cpu": time.process_time, "cuda": time.perf_counter}


def fresh(dtype: torch.dtype, device: str) -> Any:
    return load_pretrained(MODEL)[0].to(device, dtype).train()


def floor(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.requires_grad_(False)
    inputs = {k: v for k, v in batch.items() if k != "input_ids"}

    def step() -> None:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeddings, **inputs).loss.backward()

    return step


def adapted(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(**batch).loss.backward()

    return step


def peft_model(dtype: torch.dtype, device: str, dropout: float) -> Any:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(fresh(dtype, device), config).train()


def our_model(peft: Any, dtype: torch.dtype, device: str, dropout: float) -> Any:
    """Ours with PEFT's very factors, so that both compute the same."""
    model = rw.attach(fresh(dtype, device), rw.LoRA(rank=8, alpha=16, dropout=dropout))
    theirs = dict(peft.base_model.model.named_modules())
    with torch.no_grad():
        for pair in rw.pairs(model):
            A, B = pair.parameters
            A.copy_(theirs[pair.name].lora_A["default"].weight)
            B.copy_(theirs[pair.name].lora_B["default"].weight)
    return model


def largest_gradient_gap(ours: Any, peft: Any) -> float:
    """Over all factors, ‖g − g_peft‖ / ‖g_peft‖; with dropout the masks differ and this says nothing."""
    theirs = dict(peft.base_model.model.named_modules())
    gaps = []
    for pair in rw.pairs(ours):
        layer = theirs[pair.name]
        for own, other in zip(pair.parameters, (layer.lora_A["default"], layer.lora_B["default"]), strict=True):
            assert float(own.grad.norm()) > 0
            gaps.append(float((own.grad - other.weight.grad).norm() / other.weight.grad.norm()))
    return max(gaps)


def training_step(dtype: torch.dtype, dropout: float, rounds: int, device: str) -> dict[str, Any]:
    batch = {k: v.to(device) for k, v in batches(1, full=True)[0].items()}
    peft = peft_model(dtype, device, dropout)
    ours = our_model(peft, dtype, device, dropout)
    ga = rw.attach(fresh(dtype, device), rw.LoRA(rank=8, init="pissa", dropout=dropout))
    contenders = {"floor": floor(fresh(dtype, device), batch), "rankwise": adapted(ours, batch)}
    contenders |= {"rankwise, anchored start": adapted(ga, batch), "peft": adapted(peft, batch)}
    times = interleaved(contenders, rounds, warmup=1, clock=CLOCK[device])
    result: dict[str, Any] = {"seconds": {name: seconds(t) for name, t in times.items()}}
    for name in list(contenders)[1:]:
        result[f"{name} / floor"] = ratio(times[name], times["floor"])
    result["peft / rankwise"] = ratio(times["peft"], times["rankwise"])
    if not dropout:
        result["largest relative gap of a gradient to peft's"] = largest_gradient_gap(ours, peft)
    return result


def housekeeping(rounds: int) -> dict[str, Any]:
    """attach, save, load, merge + restore on the fp32 model."""
    base, peft_base = fresh(torch.float32, "cpu"), fresh(torch.float32, "cpu")
    peft = peft_model(torch.float32, "cpu", 0.0)
    ours = our_model(peft, torch.float32, "cpu", 0.0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        peft.save_pretrained(folder / "adapter")

        def attach() -> None:
            rw.detach(rw.attach(base, rw.LoRA(rank=8)))

        def load() -> None:
            rw.detach(rw.load(base, folder / "adapter"))

        def merge() -> None:
            rw.merge(ours)
            rw.unmerge(ours)

        def peft_merge() -> None:
            peft.merge_adapter()
            peft.unmerge_adapter()

        pairs = {
            "attach (and detach)": (attach, lambda: get_peft_model(peft_base, config).unload()),
            "save": (lambda: rw.save(ours, folder / "ours"), lambda: peft.save_pretrained(folder / "theirs")),
            "load (and detach)": (load, lambda: PeftModel.from_pretrained(peft_base, folder / "adapter").unload()),
            "merge + restore": (merge, peft_merge),
        }
        result = {}
        for name, (mine, theirs) in pairs.items():
            times = interleaved({"rankwise": mine, "peft": theirs}, rounds, clock=CLOCK["cpu"])
            result[name] = {k: seconds(t) for k, t in times.items()}
            result[name]["peft / rankwise"] = ratio(times["peft"], times["rankwise"])
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help='measure one configuration anew, such as "float32, dropout 0.0"')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = "training_step" if options.device == "cpu" else f"training_step_{options.device}"
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text()) if options.only else {}
    result |= {"what": __doc__, "machine": machine(options.device)}
    result["clock"] = CLOCK[options.device].__name__
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.05):
            case = f"{str(dtype).removeprefix('torch.')}, dropout {dropout}"
            if options.only in (None, case):
                result[case] = {"rounds": options.rounds} | training_step(
                    dtype, dropout, options.rounds, options.device
                )
                print(case, {k: v for k, v in result[case].items() if k != "seconds"}, flush=True)
    if options.device == "cpu" and not options.only:
        result["housekeeping"] = housekeeping(options.rounds)
        print(result["housekeeping"])
    write(name, result)


if __name__ == "__main__":
    main()
