"""Many adapters on one model: what a call does depends on the adapters that it names, not on how many there are.

Work is counted in calls of Python functions, not in seconds, so nothing depends on the machine.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.variants.base import AdapterLayer

FEW, MANY = 4, 40


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def calls(action: Callable[..., Any], *arguments: Any) -> int:
    """Python functions that an action calls; a generator's every step is one, so a scan of the model counts in full."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action(*arguments)
    finally:
        sys.setprofile(before)
    return count


def attached(count: int, **options: Any) -> nn.Module:
    model = network()
    for number in range(count):
        rw.attach(model, rw.LoRA(rank=1, target_modules=["0", "2"], **options), name=f"adapter{number}")
    return model


def attach(model: nn.Module, folder: Path) -> None:
    rw.attach(model, rw.LoRA(rank=1, target_modules=["0", "2"]), name="another")


def attach_elsewhere(model: nn.Module, folder: Path) -> None:
    rw.attach(model, rw.LoRA(rank=1, target_modules=["4"]), name="another")


def load(model: nn.Module, folder: Path) -> None:
    rw.load(model, folder, name="another")


def save(model: nn.Module, folder: Path) -> None:
    rw.save(model, folder / "copy", name="adapter1")


def activate(model: nn.Module, folder: Path) -> None:
    rw.activate(model, "adapter1")


def disable(model: nn.Module, folder: Path) -> None:
    with rw.disabled(model):
        pass


def detach(model: nn.Module, folder: Path) -> None:
    rw.detach(model, "adapter1")


STEPS = [attach, load, save, activate, disable, detach]


@pytest.mark.parametrize(
    ("step", "whole"), [(attach_elsewhere, ()), *((step, whole) for step in STEPS for whole in ((), ("4",)))]
)
def test_a_call_does_the_same_with_many_adapters(step: Callable[..., None], whole: tuple[str, ...], tmp_path: Path):
    rw.save(attached(1, modules_to_save=whole), tmp_path)
    step(attached(2, modules_to_save=whole), tmp_path)  # what is done once in a process
    few, many = (calls(step, attached(count, modules_to_save=whole), tmp_path) for count in (FEW, MANY))
    assert few > 20
    assert many - few < MANY - FEW  # not one call more for each adapter more


def test_activating_touches_only_what_was_or_becomes_active(monkeypatch: pytest.MonkeyPatch):
    model = attached(MANY)
    touched: list[AdapterLayer] = []
    switch = AdapterLayer.requires_grad_

    def recorded(layer: AdapterLayer, requires_grad: bool = True) -> AdapterLayer:
        touched.append(layer)
        return switch(layer, requires_grad)

    monkeypatch.setattr(AdapterLayer, "requires_grad_", recorded)
    for before, after in ((f"adapter{MANY - 1}", "adapter3"), ("adapter3", "adapter7")):
        touched.clear()
        rw.activate(model, after)
        slots = Adapted.of(model).slots.values()
        assert {id(layer) for layer in touched} == {
            id(slot.adapters[name]) for slot in slots for name in (before, after)
        }
        assert len(touched) == 2 * 2
        assert {id(p) for p in rw.trainable_parameters(model)} == {
            id(p) for pair in rw.pairs(model, after) for p in pair.parameters
        }


def test_sites_stay_in_the_model_s_order():
    model = network()
    for path in ("4", "0", "2"):
        rw.attach(model, rw.LoRA(rank=1, target_modules=[path]), name=f"on{path}")
    assert list(Adapted.of(model).slots) == ["0", "2", "4"]
    rw.detach(model, "on2")
    assert list(Adapted.of(model).slots) == ["0", "4"]
