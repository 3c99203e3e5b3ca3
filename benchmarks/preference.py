"""DPO on SmolLM2-135M: what the reference is before the first step, for every start, and in PEFT.

    python benchmarks/preference.py

Before any step the policy is the reference, so that the loss is log 2 = 0.693147 and every reward 0, if the reference
is the pretrained model. Here it is the model with the adapter switched off, through TRL's DPOTrainer in both libraries.
With PEFT's PiSSA or LoRA-GA what is left then is W₀ − s B₀A₀. TRL treats a PeftModel that is handed over otherwise: it
adds a copy of the adapter for the reference, whose start is subtracted from the base a second time.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import MODEL, batches, machine, write
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.config import LoraGAConfig
from rich.console import Console
from trl import DPOConfig, DPOTrainer

from rankwise.inits import INITS
from rankwise.train import recipe as recipes
from rankwise.train.data.kjv import kjv_pairs
from rankwise.train.model.pretrained import load_pretrained
from rankwise.train.run import run

SILENT = Console(quiet=True)
PAIRS, SIZE, LENGTH, BETA = 4, 2, 128, 0.1


def written(path: Path, pairs: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


def recipe(out: Path, **changes: Any) -> recipes.Recipe:
    out.mkdir(parents=True, exist_ok=True)
    values = {
        "model": MODEL,
        "task": "preference",
        "data": written(out / "pairs.jsonl", kjv_pairs(held_out=False)[:64]),
        "beta": BETA,
        "dtype": "float32",
        "max_train_samples": PAIRS,
        "max_length": LENGTH,
        "per_device_train_batch_size": SIZE,
        "per_device_eval_batch_size": SIZE,
        "init_batches": 1,
        "logging_steps": 1,
        "output_dir": str(out),
    }
    return recipes.parse(values | changes)


def ours(out: Path, init: str) -> dict[str, float]:
    """The loss before the first step, the mean of two batches."""
    prepared = run.prepare(run.load(recipe(out, init=init), SILENT), SILENT)
    model = prepared.model.train()
    losses = [float(prepared.trainer.batch_loss(model, batch).detach()) for batch in prepared.batches]
    loss = sum(losses) / len(losses)
    return shown(init, {"loss": round(loss, 7), "from log 2": abs(loss - math.log(2))})


def shown(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    print(name, figures, flush=True)
    return figures


def config(init: str) -> LoraConfig:
    options = {"lora_ga_config": LoraGAConfig()} if init == "lora_ga" else {}
    kind = True if init == "default" else init
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=kind, **options)


def peft(out: Path, init: str, *, handed_over: bool) -> dict[str, float]:
    """The same in PEFT, and how far the policy's log-likelihoods are from the pretrained model's then.

    Args:
        handed_over: TRL gets a PeftModel, instead of the configuration to make one of.
    """
    model, tokenizer = load_pretrained(MODEL, dtype="float32")
    pretrained, chosen = model.eval(), config(init)
    (batch,) = batches(1, SIZE, LENGTH)
    with torch.no_grad():
        likelihood = float(pretrained(**batch).loss)
    if init == "lora_ga":
        preprocess_loraga(model, chosen, lambda: model(**batch).loss.backward())
    arguments = DPOConfig(
        str(out), beta=BETA, max_length=LENGTH, per_device_train_batch_size=SIZE, bf16=False, report_to="none",
        gradient_checkpointing=False, use_cpu=True,
    )  # fmt: skip
    data = Dataset.from_list(kjv_pairs(held_out=False)[:PAIRS])
    given = {"model": get_peft_model(model, chosen)} if handed_over else {"model": model, "peft_config": chosen}
    trainer = DPOTrainer(args=arguments, train_dataset=data, processing_class=tokenizer, **given)
    losses = []
    with torch.no_grad():
        for pairs in trainer.get_train_dataloader():
            losses.append(float(trainer.compute_loss(trainer.model, pairs)))
        moved = float(trainer.model(**batch).loss) - likelihood
    rewards = trainer._metrics["train"]["rewards/margins"]
    figures = {
        "loss": round(sum(losses) / len(losses), 7),
        "from log 2": abs(sum(losses) / len(losses) - math.log(2)),
        "reward margin": round(sum(rewards) / len(rewards), 5),
        "policy's loss above the pretrained model's": round(moved, 6),
    }
    return shown(f"PEFT {init}, {'handed over' if handed_over else 'configuration'}", figures)


def training(out: Path, init: str, rate: float) -> dict[str, Any]:
    """A few steps of DPO, judged on held-out books."""
    changes: dict[str, Any] = {
        "max_train_samples": 64,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "eval_steps": 8,
    }
    changes["eval_data"] = written(out.with_suffix(".jsonl"), kjv_pairs(held_out=True)[:16])
    result = run.train(recipe(out, init=init, scaling="rslora", learning_rate=rate, **changes), SILENT)
    names = ("eval_loss_before", "eval_loss_after", "reward_accuracy", "reward_margin", "train_seconds")
    return shown(init, {"learning_rate": rate, "steps": 8} | {name: round(result.metrics[name], 5) for name in names})


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    starts = [name for name, row in INITS.items() if row.cls.keeps_function]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        theirs = {name: peft(out / "peft", name, handed_over=False) for name in ("pissa", "lora_ga", "default")}
        other = {name: peft(out / "peft", name, handed_over=True) for name in ("pissa", "default")}
        trained = {"lora-ga": training(out / "b", "lora-ga", 2e-5), "kaiming": training(out / "a", "kaiming", 1e-4)}
        result = {
            "what": __doc__,
            "machine": machine(),
            "beta": BETA,
            "pairs": PAIRS,
            "rankwise, loss before the first step": {init: ours(out / init, init) for init in starts},
            "PEFT by its configuration, reference: adapter disabled": theirs,
            "PEFT as a PeftModel, reference: a second adapter": other,
            "rankwise, 8 steps of 4 pairs": trained,
        }
    write("preference", result)


if __name__ == "__main__":
    main()
