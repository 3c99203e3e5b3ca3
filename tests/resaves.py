"""Saves adapters over each other in a process that is killed again and again, while another process reads them.

A program of its own::

    python tests/resaves.py --kills 100 --seed 0 --work DIR

prints one JSON object with how often what was read. A mixture of two adapters ends it with an error, as does anything
that a killed process left for good.
"""

import argparse
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import BrokenFile

# Of two and two the tensors alone differ, so that one rename does it.
SPECS = {
    "of rank 2": rw.LoRA(rank=2, alpha=4, seed=0),
    "of rank 2, of other tensors": rw.LoRA(rank=2, alpha=4, seed=0),
    "of rank 2, with another alpha": rw.LoRA(rank=2, alpha=64, seed=0),
    "of rank 3, with another formula": rw.LoRA(rank=3, alpha=4, scaling="rslora", seed=0),
}
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4))


def adapted(seed: int, spec: rw.LoRA) -> nn.Module:
    model = rw.attach(base(), spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def read(folder: Path, expected: dict[str, Tensor], *, with_peft: bool) -> str:
    """Whose adapter is in the directory, or "refused"."""
    try:
        model = PeftModel.from_pretrained(base(), folder) if with_peft else rw.load(base(), folder)
    except (BrokenFile, ValueError) as error:
        # PEFT looks for it on a hub then.
        assert "adapter_config.json: no such file" in str(error) or "Can't find 'adapter_config.json'" in str(error)
        return "refused"
    y = model(X)
    return next((name for name, value in expected.items() if torch.allclose(y, value, rtol=1e-4, atol=1e-3)), "mixed")


def save_for_ever(models: list[nn.Module], folder: Path) -> int:
    """In a child, whose process id is returned."""
    child = os.fork()
    if child:
        return child
    for model in itertools.cycle(models):
        rw.save(model, folder)
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, folder = random.Random(options.seed), options.work / "adapter"
    models = [adapted(number, spec) for number, spec in enumerate(SPECS.values())]
    expected = {name: model(X).detach() for name, model in zip(SPECS, models, strict=True)}
    rw.save(models[0], folder)
    meanwhile, afterwards = Counter[str](), Counter[str]()
    for _ in range(options.kills):
        rng.shuffle(models)
        child = save_for_ever(models, folder)
        end = time.monotonic() + rng.uniform(0.0, 0.2)
        try:
            while time.monotonic() < end:
                meanwhile[read(folder, expected, with_peft=False)] += 1
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        ours, pefts = (read(folder, expected, with_peft=with_peft) for with_peft in (False, True))
        assert ours == pefts, (ours, pefts)
        afterwards[ours] += 1
    rw.save(models[0], folder)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["adapter_config.json", "adapter_model.safetensors", "rankwise.json"], left
    counts = {
        "kills": options.kills,
        "read while it was saved": meanwhile.total(),
        "of these mixed": meanwhile["mixed"],
        "of these refused": meanwhile["refused"],
        "mixed after a kill": afterwards["mixed"],
        "refused after a kill": afterwards["refused"],
    }
    assert counts["of these mixed"] == counts["mixed after a kill"] == 0, counts
    print(json.dumps({"seed": options.seed, **counts}))


if __name__ == "__main__":
    main()
