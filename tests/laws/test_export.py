"""The portable profile is the same adapter: every init × variant, with patterns, whatever the layers."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import LAYERS, PAIR_VARIANTS, perturb, relative, zoo_and_inputs

import rankwise as rw
from rankwise.adapter import Adapter, SiteAdapter
from rankwise.exporting.portable import RANKS, portable_profile
from rankwise.inits import INITS
from rankwise.scaling import SCALINGS

LINEAR = ["linear", "linear_without_bias", "wide", "conv1d"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"wide": 5}, "alpha_pattern": {"^linear$": 0.7}}


def adapted(names: list[str], **fields: Any) -> Any:
    zoo, inputs = zoo_and_inputs(names=names)
    spec = rw.LoRA(**{"rank": 2, "alpha": 3, "target_modules": names, **fields})
    if spec.init.needs == "weights":
        original, _ = zoo_and_inputs(torch.float64, names)
        perturb(original, 0.01)
        rw.attach(zoo, spec, evidence=rw.weights(original, names))
    else:
        rw.attach(zoo, spec, batches=[inputs])
    perturb(zoo, 0.2)
    return zoo.eval()


def check_portable(folder: Path) -> None:
    """One rank, alpha = rank, no pattern, no rsLoRA, no regular expression."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert isinstance(config["target_modules"], list)


def check_same(folder: Path, exported: Path) -> None:
    before, after = rw.read(folder), rw.read(exported)
    assert before.sites.keys() == after.sites.keys()
    for path, site in before.sites.items():
        other = after.sites[path]
        assert other.delta.scale == 1.0
        assert relative(other.delta.dense(), site.delta.dense()) < 1e-6, path
        assert site.extra.keys() == other.extra.keys()
        assert all(torch.equal(other.extra[key], site.extra[key]) for key in site.extra)


@pytest.mark.parametrize("variant", PAIR_VARIANTS)
@pytest.mark.parametrize("init", INITS)
def test_every_init_and_variant(init: str, variant: str, tmp_path: Path) -> None:
    patterns = {} if variant == "adalora" else PATTERNS
    rw.save(adapted(LINEAR, init=init, variant=variant, **patterns), tmp_path / "adapter")
    rw.export(tmp_path / "adapter", "peft", tmp_path / "out")
    check_portable(tmp_path / "out")
    check_same(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_layer_as_peft_computes_it(variant: str, scaling: str, tmp_path: Path) -> None:
    """With the profile PEFT's outputs are ours; of a scale that PEFT has no word for, too."""
    unlike = ("dilated", "reflect", "circular", "conv1d")  # PEFT warns of Conv1D beside Linear
    names = [name for name in LAYERS if not name.endswith(unlike)]
    zoo = adapted(names, variant=variant, scaling=scaling, rank_pattern={"wide": 5})
    _, inputs = zoo_and_inputs(names=names)
    rw.save(zoo, tmp_path / "adapter")
    rw.export(tmp_path / "adapter", "peft", tmp_path / "out")
    check_portable(tmp_path / "out")
    check_same(tmp_path / "adapter", tmp_path / "out")
    base, _ = zoo_and_inputs(names=names)
    with torch.no_grad():
        expected, before = zoo(**inputs).outputs, base(**inputs).outputs
        read = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()(**inputs).outputs
    for name in names:
        if variant == "dora" and name == "conv2d_grouped":
            continue  # PEFT's DoRA takes another norm there
        assert relative(read[name], expected[name]) < 2e-5, name
        assert relative(before[name], expected[name]) > 1e-2, name


@given(
    shapes=st.lists(st.tuples(*[st.integers(1, 12)] * 3, st.floats(1e-3, 1e3), st.sampled_from((1, 2, 3))), min_size=1),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_one_rank_for_all(shapes: list[tuple[int, int, int, float, int]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sites = {
        f"site{place}": SiteAdapter(
            "conv2d" if groups > 1 else "linear",
            rw.LowRank(
                torch.randn(out, rank, generator=generator, dtype=dtype),
                torch.randn(rank, into, generator=generator, dtype=dtype),
                scale,
            ),
            groups=groups,
        )
        for place, (out, rank, into, scale, groups) in enumerate(shapes)
    }
    profile = portable_profile(Adapter(rw.LoRA(rank=1), sites, tuple(sites)))
    ranks = {profile.sites[path].delta.rank * site.groups for path, site in sites.items()}
    assert len(ranks) == 1
    assert ranks <= set(RANKS) or max(groups for *_, groups in shapes) == 3
    assert ranks == {profile.spec.rank} == {profile.spec.alpha}
    for path, site in sites.items():
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert profile.sites[path].delta.scale == 1.0
        assert relative(profile.sites[path].delta.dense(), site.delta.dense()) < tolerance


def test_whole_modules_stay_for_peft(tmp_path: Path) -> None:
    zoo = adapted(["linear", "wide"], target_modules=["wide"], modules_to_save=["linear"])
    rw.save(zoo, tmp_path / "adapter")
    rw.export(tmp_path / "adapter", "peft", tmp_path / "out")
    base, inputs = zoo_and_inputs(names=["linear", "wide"])
    read: nn.Module = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        for name, expected in zoo(**inputs).outputs.items():
            assert relative(read(**inputs).outputs[name], expected) < 2e-6
