"""Files of kohya's and diffusers' layouts say what they say there, and come back as they were written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import perturb, relative

import rankwise as rw
from rankwise.adapter import Adapter
from rankwise.errors import (
    MissingTensor,
    NonFiniteTensor,
    ShapeMismatch,
    SpecError,
    UnexpectedTensor,
    UnsupportedAdapter,
)
from rankwise.format.diffusion import read_diffusers, read_kohya, write_diffusers, write_kohya
from rankwise.format.save_load import portable


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 6)])


class Unet(nn.Module):
    """Names as in diffusers: underscores and dots both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.down_blocks = nn.ModuleList([Attention()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_in(x).flatten(2).mT
        block: Attention = self.down_blocks[0]
        return block.to_out[0](block.to_q(y))


NAMES = ("conv_in", "down_blocks.0.to_q", "down_blocks.0.to_out.0")


def unet() -> Unet:
    torch.manual_seed(0)
    return Unet()


def trained(**spec: object) -> tuple[Unet, Adapter]:
    model = unet()
    rw.attach(model, rw.LoRA(**{"rank": 2, "alpha": 6, "target_modules": list(NAMES)} | spec))
    perturb(model, 0.3)
    return model, portable(model)


def change(tensors: dict[str, Tensor], stem: str, down: str, up: str) -> Tensor:
    """up · down of a layer in a file, [out, in]."""
    return tensors[f"{stem}.{up}"].flatten(1) @ tensors[f"{stem}.{down}"].flatten(1)


def same_function(adapter: Adapter, model: nn.Module, folder: Path) -> None:
    """The adapter, through PEFT's directory too, does what the model's own does."""
    rw.write(adapter, folder)
    x = torch.randn(2, 3, 4, 5)
    assert relative(rw.load(unet(), folder)(x), model(x)) < 1e-6


@pytest.mark.parametrize("spec", [{}, {"scaling": "rslora", "init": "pissa", "rank_pattern": {"to_q": 3}}], ids=str)
def test_kohya(spec: dict[str, object], tmp_path: Path):
    model, adapter = trained(**spec)
    write_kohya({"lora_unet": adapter, "lora_te": adapter}, tmp_path / "file.safetensors")
    tensors = load_file(tmp_path / "file.safetensors")
    for name, site in adapter.sites.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        scale = float(tensors[f"{stem}.alpha"]) / len(tensors[f"{stem}.lora_down.weight"])
        assert relative(scale * change(tensors, stem, "lora_down.weight", "lora_up.weight"), site.delta.dense()) < 1e-6
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape[1:] == (3, 3, 3)
    found = read_kohya(tmp_path / "file.safetensors", {"lora_unet": unet(), "lora_te": NAMES})
    assert found.keys() == {"lora_unet", "lora_te"}
    for other in found.values():
        same_function(other, model, tmp_path / "adapter")


@pytest.mark.parametrize("spec", [{}, {"scaling": "rslora", "init": "pissa", "rank_pattern": {"to_q": 3}}], ids=str)
def test_diffusers(spec: dict[str, object], tmp_path: Path):
    model, adapter = trained(**spec)
    write_diffusers({"unet": adapter}, tmp_path / "file.safetensors")
    tensors = load_file(tmp_path / "file.safetensors")
    for name, site in adapter.sites.items():
        found = change(tensors, f"unet.{name}", "lora_A.weight", "lora_B.weight")  # of alpha = r
        assert relative(found, site.delta.dense()) < 1e-6
    assert len({len(tensor) for key, tensor in tensors.items() if "lora_A" in key}) == 1  # one rank for all
    same_function(read_diffusers(tmp_path / "file.safetensors")["unet"], model, tmp_path / "adapter")


def test_the_earlier_names_of_diffusers_and_its_metadata(tmp_path: Path):
    A, B = torch.randn(2, 6), torch.randn(8, 2)
    tensors = {
        "unet.a.to_q.lora.down.weight": A,
        "unet.a.to_q.lora.up.weight": B,
        "unet.b.processor.to_k_lora.down.weight": A,
        "unet.b.processor.to_k_lora.up.weight": B,
        "unet.b.processor.to_out_lora.down.weight": A,
        "unet.b.processor.to_out_lora.up.weight": B,
        "text_encoder.q_proj.lora_linear_layer.down.weight": A,
        "text_encoder.q_proj.lora_linear_layer.up.weight": B,
        "text_encoder.k_proj.lora_A.weight": A,
        "text_encoder.k_proj.lora_B.weight": B,
        "text_encoder.q_proj.alpha": torch.tensor(6.0),
    }
    stated = {"text_encoder.lora_alpha": 5, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_k": 1}}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(stated)})
    found = read_diffusers(tmp_path / "x.safetensors")
    scales = {f"{c}.{path}": site.delta.scale for c, adapter in found.items() for path, site in adapter.sites.items()}
    assert scales == {
        "unet.a.to_q": 2.0,
        "unet.b.to_k": 0.5,
        "unet.b.to_out.0": 2.0,
        "text_encoder.q_proj": 3.0,  # its own alpha has the last word
        "text_encoder.k_proj": 2.5,
    }


def written(tmp_path: Path, **changes: Tensor | None) -> Path:
    """A sound file of kohya's with some tensors changed, added or taken out."""
    tensors = {"down": torch.ones(1, 6), "up": torch.ones(8, 1), "alpha": torch.tensor(1.0)} | changes
    stem = "lora_unet_down_blocks_0_to_q"
    names = {"down": f"{stem}.lora_down.weight", "up": f"{stem}.lora_up.weight", "alpha": f"{stem}.alpha"}
    save_file({names.get(k, k): t for k, t in tensors.items() if t is not None}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"lora_unet_down_blocks_0_to_q.hada_w1_a": torch.ones(1, 1)}, UnsupportedAdapter),
        ({"lora_unet_down_blocks_0_to_q.dora_scale": torch.ones(8, 1)}, UnsupportedAdapter),
        ({"lora_te_q_proj.lora_up.weight": torch.ones(1, 1)}, UnexpectedTensor),
        ({"up": None}, MissingTensor),
        ({"up": torch.ones(8, 2)}, ShapeMismatch),
        ({"up": torch.ones(8, 1, dtype=torch.int32)}, ShapeMismatch),
        ({"alpha": torch.tensor(-1.0)}, SpecError),
        ({"up": torch.full((8, 1), float("nan"))}, NonFiniteTensor),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
def test_files_that_do_not_hold_pairs_are_refused(changes: dict[str, Tensor], error: type[Exception], tmp_path: Path):
    assert read_kohya(written(tmp_path), {"lora_unet": unet()})["lora_unet"].sites.keys() == {"down_blocks.0.to_q"}
    with pytest.raises(error):
        read_kohya(written(tmp_path, **changes), {"lora_unet": unet()})


def test_what_the_layouts_have_no_place_for_is_refused(tmp_path: Path):
    _, dora = trained(variant="dora")
    for write in (write_kohya, write_diffusers):
        with pytest.raises(UnsupportedAdapter, match="lora_magnitude_vector, for which"):
            write({"unet": dora}, tmp_path / "x.safetensors")
    plain = rw.algebra.combine([(dora, 1.0)], "svd", error=0.0, base=unet())
    write_kohya({"unet": plain.adapter}, tmp_path / "x.safetensors")
    save_file({"unet.to_q.weight": torch.ones(2, 2)}, tmp_path / "y.safetensors")
    with pytest.raises(UnsupportedAdapter, match="another layout"):
        read_diffusers(tmp_path / "y.safetensors")
    twice = {"unet.to_q.lora_A.weight": torch.ones(1, 2), "unet.to_q.lora.down.weight": torch.ones(1, 2)}
    save_file(twice, tmp_path / "y.safetensors")
    with pytest.raises(UnexpectedTensor, match="a second A"):
        read_diffusers(tmp_path / "y.safetensors")


def test_renamed_modules(tmp_path: Path):
    model, adapter = trained()
    moved = nn.ModuleDict({"body": unet()})
    found = rw.algebra.renamed(adapter, {r"^(?=conv_in|down_blocks)": "body."})
    rw.write(found, tmp_path)
    x = torch.randn(2, 3, 4, 5)
    rw.load(moved, tmp_path)
    assert relative(moved["body"](x), model(x)) < 1e-6
    with pytest.raises(SpecError, match="matches none"):
        rw.algebra.renamed(adapter, {"decoder": "x"})
    with pytest.raises(SpecError, match="one name to several"):
        rw.algebra.renamed(adapter, {".*": "x"})
