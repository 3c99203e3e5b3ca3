"""SmolLM2-135M on the King James Bible in the comparison's settings: what several benchmarks train and judge."""

import tempfile
from pathlib import Path
from typing import Any

import rankwise as rw
from rankwise.adapter import Adapter
from rankwise.train import recipe as recipes
from rankwise.train.data.dataset import Data, load_data
from rankwise.train.run import run
from rankwise.train.run.run import Prepared
from rankwise.trials.preparing import SILENT

RECIPE = Path(__file__).parent / "comparison" / "kjv.yaml"
ADAPTERS = Path(__file__).parent.parent / "build" / "kjv"  # what has been trained, so that nothing is trained twice


def recipe(**changes: Any) -> recipes.Recipe:
    return recipes.load(RECIPE, changes)


def data() -> Data:
    """The same samples for every run, whatever its seed."""
    return load_data(recipe())


def untrained(samples: Data, **changes: Any) -> Prepared:
    """A run before its adapter is attached."""
    return run.check(run.load(recipe(**changes), SILENT), SILENT, data=samples)


def trained(prepared: Prepared) -> Prepared:
    """After its last step. Nothing is evaluated or saved on the way, but for what the recipe's ``ship_rank`` does."""
    trainer = prepared.trainer
    held_out, trainer.args.eval_on_start = trainer.eval_dataset, False
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.eval_dataset = None
    trainer.train()
    trainer.eval_dataset = held_out
    return prepared


def judged(prepared: Prepared, *parts: str) -> dict[str, float]:
    """Loss on the held-out samples: one half, "validation", to choose by, the other, "test", to report."""
    trainer = prepared.trainer
    held_out, losses = trainer.eval_dataset, {}
    for part in parts:
        trainer.eval_dataset = held_out.select(range(("validation", "test").index(part), len(held_out), 2))
        losses[part] = round(float(trainer.evaluate()["eval_loss"]), 4)
    trainer.eval_dataset = held_out
    return losses


def judged_with(prepared: Prepared, adapter: Adapter) -> dict[str, float]:
    """The test loss of the pretrained model with an adapter on it, which is taken off again."""
    with tempfile.TemporaryDirectory() as directory:
        rw.write(adapter, directory)
        rw.load(prepared.model, directory, trainable=False)
    prepared.trainer.state.global_step = 1  # before the first step it evaluates the pretrained model
    losses = judged(prepared, "test")
    rw.detach(prepared.model)
    return losses
