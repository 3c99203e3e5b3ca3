"""Convolutions whose change PEFT computes otherwise: `inspect` says so exactly there, and PEFT's own are refused."""

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from zoo import perturb

import rankwise as rw
from rankwise.errors import BrokenFile, UnsupportedAdapter
from rankwise.inspection.inspection import inspect

SHAPES: list[dict[str, Any]] = [
    {"kernel_size": size, "padding": padding, "padding_mode": mode, "dilation": dilation}
    for size, padding, mode, dilation in itertools.product(
        (1, 3), (0, 1, "same", "valid"), ("zeros", "circular", "reflect", "replicate"), (1, 2)
    )
] + [
    {"kernel_size": (1, 3), "padding": (0, 1), "dilation": (2, 1)},
    {"kernel_size": (1, 3), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2},
    {"kernel_size": 3, "padding": 2, "stride": 2, "padding_mode": "reflect"},
]


def saved(shape: dict[str, Any], folder: Path, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """The base, and the same with an adapter that was saved."""
    base = nn.Sequential(nn.Conv2d(4, 6, **shape))
    model = copy.deepcopy(base)
    rw.attach(model, rw.LoRA(rank=2, target_modules=["0"], **fields))
    perturb(model, 0.3)
    rw.save(model, folder)
    return base, model


def peft_agrees(base: nn.Module, model: nn.Module, folder: Path) -> bool:
    x = torch.randn(2, 4, 9, 9)
    try:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)(x)
    except RuntimeError:  # shapes that cannot be added
        return False
    return theirs.shape == model(x).shape and torch.allclose(theirs, model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_inspect_says_where_peft_computes_another_function(tmp_path: Path, variant: str):
    agreed = 0
    for number, shape in enumerate(SHAPES):
        folder = tmp_path / str(number)
        base, model = saved(shape, folder, variant=variant)
        found = inspect(folder)
        verdict = next(verdict for verdict in found.engines if verdict.engine == "PEFT")
        agrees = peft_agrees(base, model, folder)
        assert (verdict.answer, bool(found.unlike_peft)) == (("yes", False) if agrees else ("no", True)), shape
        agreed += agrees
        loaded = rw.load(copy.deepcopy(base), folder)
        x = torch.randn(2, 4, 9, 9)
        torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)
    print(f"{agreed} of {len(SHAPES)} shapes are read alike")
    assert 0 < agreed < len(SHAPES)


def test_what_is_read_and_written_again_keeps_saying_it(tmp_path: Path):
    saved({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, tmp_path / "one")
    rw.write(rw.read(tmp_path / "one"), tmp_path / "two")
    assert inspect(tmp_path / "two").unlike_peft == {"0": "padding_mode 'circular'"}


@pytest.mark.parametrize("shape", [{"dilation": 2}, {"padding_mode": "circular"}], ids=str)
def test_what_peft_trained_on_such_a_layer_is_no_change_of_its_weight(tmp_path: Path, shape: dict[str, Any]):
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", **shape))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAdapter, match=rf"0 is a convolution with {next(iter(shape))}"):
        rw.load(base, tmp_path)


def test_a_record_that_is_none_is_refused(tmp_path: Path):
    base, _ = saved({"kernel_size": 3}, tmp_path)
    path = tmp_path / "rankwise.json"
    path.write_text(path.read_text().replace('"unlike_peft": {}', '"unlike_peft": [1]'))
    assert any("unlike_peft" in problem for problem in inspect(tmp_path).problems)
    with pytest.raises(BrokenFile, match="unlike_peft"):
        rw.load(base, tmp_path)
