"""What `rankwise merge` writes, what it refuses, and that it touches nothing that it reads."""

import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)
from typer.testing import CliRunner
from zoo import perturb

import rankwise as rw
from rankwise.cli import app
from rankwise.errors import BrokenFile, MergeError, PretrainedError, RecipeError, WriteError
from rankwise.layers.kinds import base_matrix
from rankwise.train.model.merged import base_of, save_merged
from rankwise.train.model.pretrained import load_pretrained

pytestmark = pytest.mark.end_to_end
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model in bf16, with a generation config of its own."""
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Callable[[float], Path]:
    """An adapter of the base whose tensors have moved by so much."""

    def make(size: float) -> Path:
        model, _ = load_pretrained(base)
        rw.attach(model, rw.LoRA(rank=2))
        perturb(model, size)
        rw.save(model, tmp_path / f"adapter-{size}")
        return tmp_path / f"adapter-{size}"

    return make


def test_a_plain_transformers_directory(base: Path, adapter: Callable[[float], Path], tmp_path: Path):
    source, out = adapter(0.01), tmp_path / "merged"
    before = contents(tmp_path)
    out.mkdir()
    merged = save_merged(source, str(base), out, max_shard_size="20KB")
    assert {path: digest for path, digest in contents(tmp_path).items() if path in before} == before
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.25
    model, tokenizer = load_pretrained(out)
    original = AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template == original.chat_template and tokenizer.get_vocab() == original.get_vocab()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    adapted = rw.load(load_pretrained(base)[0], source).eval()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        gap = float((model.eval()(ids).logits - adapted(ids).logits).abs().max() / adapted(ids).logits.abs().max())
    assert 0 < merged.logit_gap < 0.05  # bf16
    assert gap < 3 * merged.logit_gap
    assert merged.weights.lost < 0.5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_in_fp32_the_outputs_stay(tiny: Path, tmp_path: Path):
    model, _ = load_pretrained(tiny)
    rw.attach(model, rw.LoRA(rank=2))
    perturb(model, 0.1)
    rw.save(model, tmp_path / "adapter")
    assert save_merged(tmp_path / "adapter", str(tiny), tmp_path / "merged").logit_gap < 1e-5


def test_a_lossy_merge_is_refused_unless_told(base: Path, adapter: Callable[[float], Path], tmp_path: Path):
    source, out = adapter(1e-6), tmp_path / "merged"
    with pytest.raises(MergeError, match=r"rounding to torch.bfloat16 would lose \d+%.*at most 70%"):
        save_merged(source, str(base), out)
    assert not out.exists()
    arguments = ["merge", str(source), "--base", str(base), "--out", str(out)]
    refused = CliRunner().invoke(app, arguments, env=WIDE)
    assert refused.exit_code == 2 and "MergeError" in refused.output
    told = CliRunner().invoke(app, [*arguments, "--most-lost", "1"], env=WIDE)
    assert told.exit_code == 0, told.output
    assert "lost to rounding" in told.output and "of the largest logit" in told.output


@pytest.mark.parametrize("place", [".", "merged", "deeper/merged"])
def test_nothing_is_written_into_what_is_read(base: Path, adapter: Callable[[float], Path], place: str):
    source = adapter(0.01)
    for read in (source, base):
        before = contents(read)
        with pytest.raises(MergeError, match=r"lies in .*, which is read|expected a new or empty directory"):
            save_merged(source, str(base), read / place)
        assert contents(read) == before


def test_a_merge_that_is_cut_off_leaves_nothing(
    base: Path, adapter: Callable[[float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = adapter(0.01)
    before = contents(tmp_path)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        save_merged(source, str(base), tmp_path / "merged")
    assert contents(tmp_path) == before
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("limit", [5_000, 40_000])  # in the tokenizer, the weights
def test_a_full_disk_is_named_and_leaves_nothing(
    base: Path, adapter: Callable[[float], Path], tmp_path: Path, limit: int
):
    """The kernel refuses to write more into a file, which each library meets as it would a full disk."""
    source = adapter(0.01)
    before = contents(tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(WriteError, match=r"merged: could not be written \(.*[Ff]ile too large"):
            save_merged(source, str(base), tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_killed_merge_left_goes_with_the_next(base: Path, adapter: Callable[[float], Path], tmp_path: Path):
    source = adapter(0.01)
    (tmp_path / ".merged.abcdefgh" / "merged").mkdir(parents=True)
    (tmp_path / ".merged.abcdefgh" / "merged" / "model.safetensors").write_bytes(b"half")
    save_merged(source, str(base), tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_place_that_cannot_be_replaced_is_named_before_any_work(
    adapter: Callable[[float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, file, link, mount = adapter(0.01), tmp_path / "file", tmp_path / "link", tmp_path / "mount"
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    mount.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mount")
    monkeypatch.setattr("rankwise.train.model.merged.load_base", None)  # it does not come to that
    for place, message in {
        file: "found that .*file is a file",
        file / "merged": "found that .*file is a file",
        link: "is a link to .*nowhere, which is not there",
        mount: "is a mount point, which no new directory can replace. Name a directory in it",
    }.items():
        with pytest.raises((MergeError, RecipeError), match=message):
            save_merged(source, None, place)


def test_an_empty_directory_behind_a_link_is_written_to(base: Path, adapter: Callable[[float], Path], tmp_path: Path):
    (tmp_path / "far").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "far")
    save_merged(adapter(0.01), str(base), tmp_path / "merged")
    assert (tmp_path / "merged").is_symlink()
    assert (tmp_path / "far" / "model.safetensors").is_file()


def test_a_base_that_a_strangers_adapter_names_runs_no_code(
    base: Path, adapter: Callable[[float], Path], tmp_path: Path
):
    """The adapter names a directory with a model of its own code: it is refused, and the code is not run."""
    source, trap = adapter(0.01), tmp_path / "trap"
    trap.mkdir()
    (trap / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {
        "AutoConfig": "modeling.Config",
        "AutoModelForCausalLM": "modeling.Model",
        "AutoTokenizer": "modeling.T",
    }
    (trap / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto_map}))
    (trap / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": auto_map}))
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": f"{source}/../trap"}))
    assert base_of(source) == f"{source}/../trap"
    with pytest.raises(PretrainedError):
        save_merged(source, None, tmp_path / "merged")
    assert not (tmp_path / "ran").exists()
    path.write_text("[")
    with pytest.raises(BrokenFile, match=r"adapter_config.json: not valid JSON"):
        save_merged(source, None, tmp_path / "merged")


# ------------------------------------------------------------------------------------- for storage in few bits

STORAGES: dict[str, Any] = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int4": lambda: TorchAoConfig(
        IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR)
    ),
}


@pytest.fixture
def wider(tmp_path: Path, tiny: Path) -> Path:
    """A model whose rows fall into groups."""
    folder = tmp_path / "wider"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("weighed", [False, True])
def test_a_quantised_reader_loses_nothing(storage: str, weighed: bool, wider: Path, tmp_path: Path):
    """What transformers loads with the storage's own configuration has the weights that were written."""
    model, _ = load_pretrained(wider)
    rw.attach(model, rw.LoRA(rank=2))
    perturb(model, 0.05)
    rw.save(model, tmp_path / "adapter")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} times {n} is {n * n}. " * 3}) + "\n" for n in range(40)))
    arguments = ["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged"), "--quantise", storage]
    arguments += ["--batches", str(data), "--batch-count", "4"] if weighed else []
    result = CliRunner().invoke(app, arguments, env=WIDE)
    assert result.exit_code == 0, result.output
    assert "nats a token" in result.output and ("layers' outputs off by" in result.output) == weighed
    plain, _ = load_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", quantization_config=STORAGES[storage]())
    layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert len(layers) == 15
    for name, layer in layers.items():
        there = base_matrix(read.get_submodule(name)).to(layer.weight.dtype)
        torch.testing.assert_close(there, layer.weight, rtol=1e-6 if storage != "int8" else 1e-3, atol=0)
        if storage in ("nf4", "fp4"):
            assert torch.equal(there, layer.weight)


def test_what_merging_for_few_bits_refuses(base: Path, adapter: Callable[[float], Path], tmp_path: Path):
    source, out = adapter(0.01), tmp_path / "merged"
    for options, said in (
        (["--quantise", "int4"], "its rows of 48 numbers do not fall into groups of 32"),
        (["--quantise", "q4"], "storage"),
        (["--batches", "kjv"], "expected --quantise"),
    ):
        result = CliRunner().invoke(
            app, ["merge", str(source), "--base", str(base), "--out", str(out), *options], env=WIDE
        )
        assert result.exit_code == 2
        assert said in result.output
        assert not out.exists()
