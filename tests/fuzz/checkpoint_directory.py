"""One adapter directory in one string of bytes, for fuzzers that know strings only; and sound ones to start from."""

from pathlib import Path

import torch
from zoo import perturb, zoo_and_inputs

import rankwise as rw
from rankwise.disk import write_json
from rankwise.tensor_files import write_tensors

NAMES = ("adapter_config.json", "adapter_model.safetensors", "rankwise.json")
_BETWEEN = b"\n--\xff--\n"  # UTF-8 has no such byte, so JSON has none either; what follows the second is one file


def packed(folder: Path) -> bytes:
    """The configuration, rankwise.json and the tensors, the tensors last."""
    config, tensors, own = ((folder / name).read_bytes() if (folder / name).is_file() else b"" for name in NAMES)
    return _BETWEEN.join((config, own, tensors))


def unpack(content: bytes, folder: Path) -> None:
    """Write the files that some bytes stand for; whatever they are, it is a directory."""
    parts = [*content.split(_BETWEEN, 2), b"", b""]
    for name, part in zip((NAMES[0], NAMES[2], NAMES[1]), parts, strict=False):
        if part:
            (folder / name).write_bytes(part)
        else:
            (folder / name).unlink(missing_ok=True)


def sound_directories(folder: Path) -> list[Path]:
    """A small adapter directory of every kind that is read."""
    made = []
    layers = ["linear", "conv2d", "conv2d_grouped", "embedding"]
    specs: dict[str, tuple[list[str], rw.LoRA | rw.Bottleneck]] = {
        "lora": (["linear"], rw.LoRA(rank=1, target_modules=["linear"])),
        "layers": (layers, rw.LoRA(rank=2, target_modules=layers, rank_pattern={"conv.*": 1}, scaling="rslora")),
        "dora": (["linear"], rw.LoRA(rank=1, target_modules=["linear"], variant="dora")),
        "whole": (["linear", "wide"], rw.LoRA(rank=1, target_modules=["wide"], modules_to_save=["linear"])),
        "bottleneck": (["linear"], rw.Bottleneck(target_modules=["linear"], width=2)),
    }
    for name, (names, spec) in specs.items():
        zoo, _ = zoo_and_inputs(names=names)
        rw.attach(zoo, spec)
        perturb(zoo, 0.1)
        rw.save(zoo, folder / name)
        made.append(folder / name)
    _write_adalora(folder / "adalora")
    return [*made, folder / "adalora"]


def _write_adalora(folder: Path) -> None:
    """As PEFT writes it, without waiting for PEFT to be imported."""
    parts = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2), "lora_E": torch.ones(2, 1)}
    write_tensors(folder / NAMES[1], {f"base_model.model.0.{name}": part for name, part in parts.items()}, {})
    config = {"peft_type": "ADALORA", "init_r": 2, "target_r": 1, "lora_alpha": 8, "target_modules": ["0"]}
    write_json(folder / NAMES[0], {**config, "rank_pattern": {"0.lora_E": [True, True]}})
