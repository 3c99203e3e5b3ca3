"""inspect: what it says of sound directories, ours and PEFT's; what it does not open; which engines read what."""

import json
import math
import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from zoo import perturb, zoo_and_inputs

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.cli import app
from rankwise.errors import BrokenFile, UnexpectedTensor
from rankwise.inspection.engines import ENGINES
from rankwise.inspection.inspection import inspect

run = CliRunner()
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def adapter(folder: Path, names: list[str] | None = None, **fields: Any) -> nn.Module:
    names = names or ["linear", "wide"]
    zoo, _ = zoo_and_inputs(names=names)
    rw.attach(zoo, rw.LoRA(**{"rank": 2, "target_modules": names, **fields}))
    perturb(zoo, 0.2)
    rw.save(zoo, folder)
    return zoo


def answers(folder: Path) -> dict[str, str]:
    found = inspect(folder)
    assert not found.problems
    return {verdict.engine: verdict.answer for verdict in found.engines}


def test_what_it_says_of_an_adapter(tmp_path: Path):
    names = ["linear", "conv2d", "conv2d_grouped", "embedding"]
    zoo = adapter(tmp_path, names, init="pissa", rank_pattern={"linear": 3})
    found = inspect(tmp_path)
    assert (found.problems, found.notes, found.peft_type, found.replaced) == ((), (), "LORA", ())
    assert {site.name: site.kind for site in found.sites} == {
        "linear": "linear", "conv2d": "conv2d", "conv2d_grouped": "conv2d", "embedding": "embedding",
    }  # fmt: skip
    for site in found.sites:
        delta = Adapted.of(zoo).adapter_layers("default")[site.name].delta()
        assert (site.shape, site.rank, site.dtype) == (tuple(delta.shape), delta.rank, "F32")
        assert site.scale == pytest.approx(delta.scale)
        assert site.change == pytest.approx(float(delta.dense().detach().norm()), rel=1e-4)
    for file in found.files:
        content = (tmp_path / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(content), sha256(content).hexdigest())
    assert len(found.files) == 3
    assert found.dtypes == {"F32": found.parameters}
    assert rw.LoRA.from_dict(found.spec or {}).rank == (found.spec or {})["rank"]


def test_it_reads_what_peft_writes(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["0"], modules_to_save=["1"])
    )
    wrapped.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert not found.problems
    assert [(site.name, site.rank, site.scale) for site in found.sites] == [("0", 4, 1.0)]
    assert found.replaced == ("1",)
    assert any(note.startswith("replaces whole modules: 1;") for note in found.notes)


def test_adalora_and_bottlenecks(tmp_path: Path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=["0", "1"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adalora")
    found = inspect(tmp_path / "adalora")
    assert not found.problems
    assert [(site.name, site.rank) for site in found.sites] == [("0", 4), ("1", 4)]
    assert answers(tmp_path / "adalora")["vLLM"] == "after export"
    zoo, _ = zoo_and_inputs(names=["linear"])
    rw.attach(zoo, rw.Bottleneck(target_modules=["linear"], width=3))
    rw.save(zoo, tmp_path / "bottleneck")
    found = inspect(tmp_path / "bottleneck")
    assert not found.problems
    assert [(site.kind, site.rank, site.change) for site in found.sites] == [("bottleneck", 3, None)]
    assert answers(tmp_path / "bottleneck")["PEFT"] == "no"
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        (None, {}, {"PEFT": "yes", "vLLM": "yes", "SGLang": "yes", "llama.cpp": "after export", "MLX": "after export"}),
        (None, {"rank_pattern": {"wide": 4}}, {"PEFT": "yes", "vLLM": "after export", "SGLang": "after export"}),
        (None, {"scaling": "rslora"}, {"PEFT": "yes", "vLLM": "yes", "SGLang": "after export"}),
        (None, {"variant": "dora"}, {"PEFT": "yes", "vLLM": "no", "llama.cpp": "no", "MLX": "after export"}),
        (["conv2d"], {}, {"PEFT": "yes", "vLLM": "no", "SGLang": "no"}),
        (["embedding"], {}, {"PEFT": "yes", "vLLM": "no", "llama.cpp": "after export", "Ollama": "after export"}),
        (["linear", "wide"], {"target_modules": ["wide"], "modules_to_save": ["linear"]}, {"vLLM": "no", "MLX": "no"}),
        (None, {"alpha_pattern": {"wide": 3}}, {"PEFT": "yes", "vLLM": "after export", "SGLang": "after export"}),
    ],
    ids=["plain", "pattern", "rslora", "dora", "conv", "embedding", "whole module", "alphas"],
)  # fmt: skip
def test_which_engines_read_it(
    tmp_path: Path, names: list[str] | None, fields: dict[str, Any], expected: dict[str, str]
):
    adapter(tmp_path, names, **fields)
    found = answers(tmp_path)
    assert {engine: found[engine] for engine in expected} == expected
    assert list(found) == ["rankwise", *(engine.label for engine in ENGINES.values())]


@pytest.mark.parametrize(
    ("base", "layer", "alpha", "ollama"),
    [
        ("meta-llama/Llama-3.2-1B", "v_proj", 16, "yes"),
        ("meta-llama/Llama-3.2-1B", "q_proj", 16, "after export"),  # its converter puts lora_A in disorder
        ("google/gemma-2-2b", "q_proj", 16, "yes"),
        ("google/gemma-3-1b", "q_proj", 16, "after export"),
        ("Qwen/Qwen3-1.7B", "q_proj", 16, "after export"),
        ("meta-llama/Llama-3.2-1B", "qkv", 16, "after export"),
        ("meta-llama/Llama-3.2-1B", "lm_head", 16, "after export"),
        ("meta-llama/Llama-3.2-1B", "v_proj", 7.5, "after export"),  # its reader takes whole numbers only
    ],
)
def test_vllms_ranks_and_ollamas_families(tmp_path: Path, base: str, layer: str, alpha: float, ollama: str):
    model = nn.ModuleDict({layer: nn.Linear(64, 64)})
    rw.attach(model, rw.LoRA(rank=20, alpha=alpha, target_modules=[layer]))
    rw.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    reasons = {verdict.engine: (verdict.answer, verdict.reason) for verdict in inspect(tmp_path).engines}
    assert reasons["vLLM"] == ("yes", "start it with --max-lora-rank 32 (its default is 16)")
    assert reasons["Ollama"][0] == ollama


def test_a_rank_of_its_own_is_right_where_the_scale_comes_from_the_tensors(tmp_path: Path):
    """PEFT's rank_pattern with one alpha: alpha / rank of each layer, which llama.cpp divides by too; vLLM does not."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = peft.LoraConfig(r=4, lora_alpha=8, rank_pattern={"1": 2}, target_modules=["0", "1"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    findings = {
        verdict.engine: {finding.about: finding.sites for finding in verdict.findings}
        for verdict in inspect(tmp_path).engines
    }
    assert list(findings["llama.cpp"]) == ["a PEFT directory"]
    assert findings["vLLM"] == {"ranks or alphas of single layers": ("1",)}


@pytest.mark.parametrize(("names", "vllm"), [(["classifier", "score"], "yes"), (["qa_outputs"], "no")])
def test_modules_to_save_that_no_tensor_belongs_to(tmp_path: Path, names: list[str], vllm: str):
    """PEFT lists heads that a model may have; vLLM takes two of the names."""
    adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": names}))
    found = answers(tmp_path)
    assert (found["PEFT"], found["vLLM"]) == ("yes", vllm)


# ------------------------------------------------------------------------------------------------ not to be trusted


def test_what_it_does_not_open(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("private")
    folder = tmp_path / "adapter"
    adapter(folder)
    (folder / "optimizer.pt").write_bytes(b"\x80\x02cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR.")
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "README.md").symlink_to(secret)
    (folder / "checkpoint").mkdir()
    os.mkfifo(folder / "pipe")
    found = inspect(folder)
    assert not found.problems  # load opens none of them
    for name in (
        "optimizer.pt' is a pickle",
        "modeling.py' is code",
        "secret, outside",
        "checkpoint' is a",
        "pipe' is no",
    ):
        assert any(name in note for note in found.notes), name
    assert {file.name: file.sha256 for file in found.files}["README.md"] is None
    rw.load(zoo_and_inputs(names=["linear", "wide"])[0], folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["models--me--it/snapshots/abc", "models--me--it/snapshots/abc/epoch/3", "mine"])
def test_the_hubs_cache_is_read_through_its_links(place: str, tmp_path: Path):
    """models--x/snapshots/<revision>/* are links to models--x/blobs; so are a download's to another directory."""
    snapshot, blobs = tmp_path / place, tmp_path / "models--me--it" / "blobs"
    adapter(snapshot)
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    found = inspect(snapshot)
    assert (found.problems, found.notes, len(found.files)) == ((), (), 3)
    rw.load(zoo_and_inputs(names=["linear", "wide"])[0], snapshot)


def test_a_directory_that_is_not_there(tmp_path: Path):
    with pytest.raises(BrokenFile, match=r"nowhere: no such directory"):
        inspect(tmp_path / "nowhere")


def test_whole_modules_can_be_refused_or_allowed_by_name(tmp_path: Path):
    adapter(tmp_path, target_modules=["wide"], modules_to_save=["linear"])
    for allowed in ((), ["head"]):
        with pytest.raises(UnexpectedTensor, match=r"linear.bias, which would replace a whole tensor.*modules_to_save"):
            rw.load(zoo_and_inputs(names=["linear", "wide"])[0], tmp_path, modules_to_save=allowed)
    for allowed in (["linear"], None):
        rw.load(zoo_and_inputs(names=["linear", "wide"])[0], tmp_path, modules_to_save=allowed)


def test_a_hostile_file_takes_neither_memory_nor_time(tmp_path: Path):
    """A hundred thousand tensors' names and modules to save, a thousand patterns that backtrack."""
    adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["rank_pattern"] = {f"(?:(?:(?:(?:.*)*)*)*)*{number}": 4 for number in range(1000)}
    config["modules_to_save"] = [f"m{number}" for number in range(300_000)]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"{'a.' * 20}{number}.weight": entry for number in range(100_000)}
    text = json.dumps(header, separators=(",", ":")).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    code = (
        "import re, sys, time; from pathlib import Path; from rankwise.inspection.inspection import inspect\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024\n"
        "peak_before, before = peak(), time.process_time(); assert inspect(sys.argv[1]).problems\n"
        "print(time.process_time() - before, peak() - peak_before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    print(f"{seconds:.1f} s, {megabytes:.0f} MB")
    assert seconds < 20
    assert megabytes < 500


GIGANTIC: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "a wide pair": ({"m.lora_A.weight": (8, 2**31 - 1), "m.lora_B.weight": (8, 8)}, {}),
    "a pair of a huge rank": ({"m.lora_A.weight": (2**17, 2**17), "m.lora_B.weight": (2**17, 2**17)}, {"r": 2**17}),
    "groups of a convolution": ({"m.lora_A.weight": (8, 2**29, 3, 3), "m.lora_B.weight": (8, 4, 1, 1)}, {}),
    "AdaLoRA": ({"m.lora_A": (8, 2**30), "m.lora_B": (2**30, 8), "m.lora_E": (8, 1)}, {"peft_type": "ADALORA"}),
    "many pairs": (
        {
            f"{i}.m.lora_{side}.weight": shape
            for i in range(100)
            for side, shape in (("A", (8, 2**24)), ("B", (2**24, 8)))
        },
        {},
    ),
    "a whole module": (
        {"m.lora_A.weight": (8, 8), "m.lora_B.weight": (8, 8), "head.weight": (2**20, 25_000)},
        {"modules_to_save": ["head"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "fields"), GIGANTIC.values(), ids=GIGANTIC)
def test_files_of_a_hundred_gigabytes_that_take_no_room(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], fields: dict[str, Any]
):
    """Their sizes are said; nothing of such a size is read or hashed, and no verdict on engines is given."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        entries[f"base_model.model.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with (tmp_path / "notes.txt").open("wb") as file:
        file.truncate(10**11)
    config = {"peft_type": "LORA", "r": 8, "init_r": 8, "lora_alpha": 8, "target_modules": ["m"], **fields}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = time.process_time()
    found = inspect(tmp_path)
    assert time.process_time() - before < 5
    assert {file.name: file.sha256 is None for file in found.files} == {
        "adapter_config.json": False, "adapter_model.safetensors": True, "notes.txt": True
    }  # fmt: skip
    assert any("too many numbers to be looked at" in note for note in found.notes)
    assert not found.problems
    assert bool(found.engines) == ("head.weight" in shapes)


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command(tmp_path: Path):
    adapter(tmp_path)
    result = run.invoke(app, ["inspect", str(tmp_path)], env=WIDE)
    assert result.exit_code == 0, result.output
    for text in ("LORA", "10 × 12", "F32", "adapter_model.safetensors", "vLLM", "after export"):
        assert text in result.output
    result = run.invoke(app, ["inspect", str(tmp_path), "--json"], env=WIDE)
    assert json.loads(result.output)["peft_type"] == "LORA"


def test_the_command_of_a_bad_directory(tmp_path: Path):
    adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    name = "\x1b[2J[red]x"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name, "lora_alpha": -1}))
    result = run.invoke(app, ["inspect", str(tmp_path)], env=WIDE)
    assert result.exit_code == 1
    assert "SpecError" in result.output and "refuses this directory" in result.output
    assert r"\x1b[2J[red]x" in result.output and "\x1b[2J" not in result.output


def test_it_loads_no_training_library(tmp_path: Path):
    adapter(tmp_path)
    heavy = "{'transformers', 'trl', 'datasets', 'matplotlib', 'peft'}"
    code = (
        "import sys; from typer.testing import CliRunner; from rankwise.cli import app;"
        f"assert CliRunner().invoke(app, ['inspect', {str(tmp_path)!r}]).exit_code == 0;"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
