"""Adapter directories that cannot be trusted or do not fit: a named error, and the model is as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import left_as_it_was, perturb, zoo_and_inputs

import rankwise as rw
from rankwise.errors import (
    BaseMismatch,
    BrokenFile,
    CheckpointError,
    MissingTensor,
    NonFiniteTensor,
    ShapeMismatch,
    SpecError,
    UnexpectedTensor,
    UnsafeFile,
    UnsupportedAdapter,
)
from rankwise.format.state import load_state, save_state
from rankwise.inspection.inspection import inspect

NAMES = ["linear", "wide", "conv2d", "conv2d_grouped", "embedding"]
KEY = "base_model.model."


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter directory."""
    folder = tmp_path_factory.mktemp("good")
    zoo, _ = zoo_and_inputs(names=NAMES)
    rw.attach(zoo, rw.LoRA(rank=2, init="pissa", target_modules=NAMES))
    perturb(zoo, 0.2)
    rw.save(zoo, folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def model() -> nn.Module:
    zoo, _ = zoo_and_inputs(names=NAMES)
    zoo.train()
    zoo.wide.eval()
    zoo.linear.bias.requires_grad_(False)
    return zoo


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})

    return spoil


def config(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        content = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({key: value for key, value in content.items() if value != "REMOVE"}))

    return spoil


def both(*spoilers: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for spoiler in spoilers:
            spoiler(folder)

    return spoil


def _set(key: str, value: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        if value is None:
            del found[KEY + key]
        else:
            found[KEY + key] = value(found.get(KEY + key)) if callable(value) else value

    return change


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 1] = float("nan")
    return tensor


def _inf(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = -float("inf")
    return tensor


def _flat_conv2d(found: dict[str, torch.Tensor]) -> None:
    for half in "AB":
        found[f"{KEY}conv2d.lora_{half}.weight"] = found[f"{KEY}conv2d.lora_{half}.weight"].flatten(1).clone()


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def renamed_pickle(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.safetensors")


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _without_linear(found: dict[str, torch.Tensor]) -> None:
    for half in "AB":
        del found[f"{KEY}linear.lora_{half}.weight"]


def without_linear_nor_list(folder: Path) -> None:
    """As another library writes: no list of sites beside the file."""
    tensors(_without_linear)(folder)
    (folder / "rankwise.json").unlink()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HUGE_HEADER = (2**62).to_bytes(8, "little") + b"{}"


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrite the header of the tensors' file and leave the data."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return spoil


def _entry(**fields: Any) -> Callable[[Path], None]:
    return _header(lambda header: header[KEY + "linear.lora_A.weight"].update(fields))


def _twice(header: dict[str, Any]) -> bytes:
    entry = json.dumps({KEY + "linear.lora_A.weight": header[KEY + "linear.lora_A.weight"]})
    return json.dumps(header).encode()[:-1] + b", " + entry.encode()[1:]


def _overlapping(header: dict[str, Any]) -> None:
    """Two tensors of one size in one place, which leaves a hole where the second was."""
    header[KEY + "linear.lora_A.weight"] = header[KEY + "wide.lora_A.weight"]


def _renamed(name: str) -> Callable[[Path], None]:
    return _header(lambda header: header.update({name: header.pop(KEY + "linear.lora_A.weight")}))


def appended(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"more")


def larger_than_read(folder: Path) -> None:
    """A header of 17 MB that a file of that size could have."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes((17 * 2**20).to_bytes(8, "little") + b"{" + b" " * (17 * 2**20 - 2) + b"}")


def link_out(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        elsewhere = folder.parent / f"elsewhere-{name}"
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return spoil


def huge_config(folder: Path) -> None:
    with (folder / "adapter_config.json").open("ab") as stream:
        stream.write(b" " * (16 * 2**20))


def many_links(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(folder / "adapter_config.json")


BAD: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "half a pair": (
        tensors(_set("linear.lora_B.weight", None)),
        MissingTensor,
        r"safetensors: linear has lora_A but no lora_B; expected both halves",
    ),
    "other half": (
        tensors(_set("embedding.lora_embedding_A", None)),
        MissingTensor,
        r"embedding has lora_embedding_B but no lora_embedding_A",
    ),
    "a site missing": (tensors(_without_linear), MissingTensor, r"no tensors for linear, which rankwise.json lists"),
    "a target missing": (
        without_linear_nor_list,
        MissingTensor,
        r"no tensors for linear, which target_modules names; the file is incomplete",
    ),
    "no tensors": (
        tensors(lambda found: found.clear()),
        MissingTensor,
        r"holds no tensors; expected lora_A and lora_B",
    ),
    "a stray tensor": (
        tensors(_set("linear.extra", torch.ones(3))),
        UnexpectedTensor,
        r"base_model.model.linear.extra \(3,\) belongs to no adapter site",
    ),
    "a half under two names": (
        tensors(_set("linear.lora_A", torch.ones(4, 12))),
        UnexpectedTensor,
        r"linear.lora_A \(4, 12\) belongs to no adapter site",
    ),
    "a whole weight": (
        tensors(_set("linear.weight", torch.ones(10, 12))),
        UnexpectedTensor,
        r"linear.weight \(10, 12\) belongs to no adapter site",
    ),
    "an unknown module": (
        both(
            tensors(
                lambda f: f.update(
                    {KEY + f"lineer.lora_{h}.weight": f[KEY + f"linear.lora_{h}.weight"].clone() for h in "AB"}
                )
            ),
            config(target_modules=[*NAMES, "lineer"]),
        ),
        BaseMismatch,
        r"tensors for 'lineer', which this model lacks; did you mean 'linear'\?.*another base",
    ),
    "A too wide": (
        tensors(_set("linear.lora_A.weight", torch.ones(4, 13))),
        ShapeMismatch,
        r"linear is a linear of 10 × 13 in the file and a linear of 10 × 12 in this model",
    ),
    "B too tall": (
        tensors(_set("linear.lora_B.weight", torch.ones(11, 4))),
        ShapeMismatch,
        r"linear of 11 × 12 in the file",
    ),
    "another rank": (
        tensors(_set("linear.lora_A.weight", torch.ones(3, 12))),
        ShapeMismatch,
        r"linear: lora_A \(3, 12\) torch.float32 and lora_B \(10, 4\).*rank 4, which adapter_config.json gives",
    ),
    "three axes": (
        tensors(_set("linear.lora_A.weight", torch.ones(4, 12, 1))),
        ShapeMismatch,
        r"linear: lora_A \(4, 12, 1\)",
    ),
    "a wide kernel in B": (
        tensors(_set("conv2d.lora_B.weight", torch.ones(8, 4, 3, 3))),
        ShapeMismatch,
        r"conv2d: .*lora_B \(8, 4, 3, 3\)",
    ),
    "another kernel": (
        tensors(_set("conv2d.lora_A.weight", torch.ones(4, 4, 2, 2))),
        ShapeMismatch,
        r"conv2d is a conv2d of 8 × \(4, 2, 2\) in the file and a conv2d of 8 × \(4, 3, 3\)",
    ),
    "other groups": (
        tensors(_set("conv2d.lora_B.weight", torch.ones(8, 2, 1, 1))),
        (ShapeMismatch, UnsupportedAdapter),
        r"conv2d",
    ),
    "a linear in the place of a convolution": (
        tensors(_flat_conv2d),
        ShapeMismatch,
        r"conv2d is a linear of 8 × 36 in the file and a conv2d",
    ),
    "whole numbers": (
        tensors(_set("linear.lora_A.weight", torch.ones(4, 12, dtype=torch.int32))),
        ShapeMismatch,
        r"torch.int32",
    ),
    "NaN": (tensors(_set("wide.lora_A.weight", _nan)), NonFiniteTensor, r"wide.lora_A.weight holds NaN or infinity"),
    "infinity": (
        tensors(_set("wide.lora_B.weight", _inf)),
        NonFiniteTensor,
        r"wide.lora_B.weight holds NaN or infinity",
    ),
    "truncated": (
        truncated,
        BrokenFile,
        r"adapter_model.safetensors \(\d+ bytes\): not a whole safetensors.*truncated",
    ),
    "empty": (write("adapter_model.safetensors", b""), BrokenFile, r"\(0 bytes\): not a whole safetensors"),
    "an LFS pointer": (write("adapter_model.safetensors", LFS), BrokenFile, r"Git LFS pointer.*fetch it again"),
    "a huge header": (write("adapter_model.safetensors", HUGE_HEADER), BrokenFile, r"not a whole safetensors"),
    "only a pickle": (
        only_a_pickle,
        UnsafeFile,
        r"adapter_model.bin, a pickle, which can run code.*refused.*expected adapter_model.safetensors",
    ),
    "a renamed pickle": (renamed_pickle, BrokenFile, r"renamed pickle"),
    "no tensors file": (remove("adapter_model.safetensors"), BrokenFile, r"adapter_model.safetensors: no such file"),
    "no config": (
        remove("adapter_config.json"),
        BrokenFile,
        r"adapter_config.json: no such file; expected an adapter directory",
    ),
    "config not JSON": (write("adapter_config.json", b'{"r": 4,'), BrokenFile, r"adapter_config.json: not valid JSON"),
    "config not text": (
        write("adapter_config.json", b"\xff\xfe\x00"),
        BrokenFile,
        r"adapter_config.json: not valid JSON",
    ),
    "config a list": (write("adapter_config.json", b"[1]"), BrokenFile, r"expected a JSON object, found list"),
    "a key twice": (
        write("adapter_config.json", b'{"peft_type": "LORA", "r": 4, "r": 8}'),
        BrokenFile,
        r"the key 'r' appears twice",
    ),
    "nested too deep": (write("adapter_config.json", b"[" * 100_000), BrokenFile, r"not valid JSON"),
    "own file broken": (write("rankwise.json", b"{"), BrokenFile, r"rankwise.json: not valid JSON"),
    "own file of other form": (write("rankwise.json", b'{"base_probe": 3}'), BrokenFile, r"rankwise.json"),
    "no kind": (config(peft_type="REMOVE"), BrokenFile, r"no peft_type; expected 'LORA'"),
    "another kind": (config(peft_type="IA3"), UnsupportedAdapter, r"peft_type is 'IA3'; expected 'LORA'"),
    "biases": (config(bias="some"), SpecError, r"bias must be one of none, lora_only, all, found 'some'"),
    "lora_bias": (config(lora_bias=True), UnsupportedAdapter, r"lora_bias is True; expected False"),
    "replication": (config(layer_replication=[[0, 2]]), UnsupportedAdapter, r"layer_replication is \[\[0, 2\]\]"),
    "negative alpha": (
        config(lora_alpha=-8),
        SpecError,
        r"adapter_config.json: alpha must be a positive finite number, found -8",
    ),
    "NaN alpha": (config(lora_alpha=float("nan")), SpecError, r"alpha must be a positive finite number, found nan"),
    "alpha in a pattern": (
        config(alpha_pattern={"linear": float("inf")}),
        SpecError,
        r"alpha_pattern\['linear'\] must be.*found inf",
    ),
    "rank 0": (config(r=0), SpecError, r"rank must be a positive integer, found 0"),
    "rank a string": (config(r="8"), SpecError, r"rank must be a positive integer, found '8'"),
    "rank 10⁹": (config(r=10**9), ShapeMismatch, r"do not make a pair of rank 1000000000"),
    "a broken pattern": (
        config(rank_pattern={"(": 4}),
        SpecError,
        r"rank_pattern key '\(' is not a regular expression",
    ),
    "a header above the limit": (larger_than_read, BrokenFile, r"header has 17825792 bytes, more than the 16777216"),
    "a tensor twice": (_header(_twice), BrokenFile, r"header: the key 'base_model.model.linear.lora_A.weight' appears"),
    "tensors that overlap": (_header(_overlapping), BrokenFile, r"which overlaps the tensor before it|leaves bytes"),
    "something appended": (appended, BrokenFile, r"not a whole safetensors file; its tensors take \d+ bytes, \d+ are"),
    "a shape that its bytes do not fit": (_entry(shape=[4, 13]), BrokenFile, r"shape \(4, 13\) of F32 takes 208 bytes"),
    "a shape that multiplies over": (_entry(shape=[2**62, 4]), BrokenFile, r"shape is \[4611686018427387904, 4\]"),
    "a negative shape": (_entry(shape=[-4, -12]), BrokenFile, r"shape is \[-4, -12\]"),
    "a type that is none": (_entry(dtype="F33"), BrokenFile, r'dtype is "F33"; expected one of BOOL'),
    "bytes outside the file": (
        _entry(data_offsets=[10**9, 10**9 + 192]),
        BrokenFile,
        r"leaves bytes that belong to none",
    ),
    "a header that is a list": (_header(lambda header: [header]), BrokenFile, r"header: expected a JSON object"),
    "a header without shapes": (_header(lambda header: dict.fromkeys(header, 3)), BrokenFile, r"expected dtype, shape"),
    "a name with commands for the terminal": (_renamed(KEY + "\x1b[2J.lora_A.weight"), BrokenFile, r"no tensor's name"),
    "a name without end": (_renamed("a" * 1001), BrokenFile, r"no tensor's name; expected at most 1000"),
    "a name that climbs": (
        both(
            tensors(lambda f: f.update({KEY + f"../../etc.lora_{h}.weight": torch.ones(4, 4) for h in "AB"})),
            config(target_modules=[*NAMES, "../../etc"]),
        ),
        BaseMismatch,
        r"'\.\./\.\./etc', which this model lacks",
    ),
    "tensors that are a link": (
        link_out("adapter_model.safetensors"),
        UnsafeFile,
        r"is a link to .*outside its directory",
    ),
    "a config that is a link": (link_out("adapter_config.json"), UnsafeFile, r"is a link to .*outside its directory"),
    "an own file that is a link": (link_out("rankwise.json"), UnsafeFile, r"is a link to .*outside its directory"),
    "a link to itself": (many_links, BrokenFile, r"adapter_config.json"),
    "a config above the limit": (
        huge_config,
        BrokenFile,
        r"adapter_config.json: has \d+ bytes; expected at most 16777216",
    ),
    "a number of 5000 digits": (
        write("adapter_config.json", b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}"),
        BrokenFile,
        r"adapter_config.json: not valid JSON",
    ),
    "half a letter": (
        write("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}'),
        BrokenFile,
        r"half of a surrogate pair",
    ),
    "code of its own": (
        config(auto_map={"AutoModel": "modeling.Model"}),
        UnsafeFile,
        r"auto_map asks to run code that comes with the adapter; none is run here",
    ),
    "trust": (config(trust_remote_code=True), UnsafeFile, r"trust_remote_code asks to run code"),
    "a base that is no name": (
        config(base_model_name_or_path=["x"]),
        BrokenFile,
        r"base_model_name_or_path is \['x'\]",
    ),
    "a switch that is none": (config(use_dora="no"), BrokenFile, r"use_dora is 'no'; expected bool or null"),
    "rank true": (config(r=True), SpecError, r"rank must be a positive integer, found True"),
    "rank -8": (config(r=-8), SpecError, r"rank must be a positive integer, found -8"),
    "alpha too large for a float": (config(lora_alpha=10**400), SpecError, r"alpha must be a positive finite number"),
    "alpha a string": (config(lora_alpha="16"), SpecError, r"alpha must be a positive finite number, found '16'"),
    "alpha true": (config(lora_alpha=True), SpecError, r"alpha must be a positive finite number, found True"),
    "a pattern of a million states": (
        config(rank_pattern={"(?:(?:a{100}){100}){100}": 4}),
        SpecError,
        r"adapter_config.json: rank_pattern key '.*': not done with \d+ module names after 10,000,000 steps",
    ),
    "dora without magnitudes": (config(use_dora=True), MissingTensor, r"lora_magnitude_vector"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_directory_is_refused_and_the_model_left_as_it_was(name: str, folder: Path):
    spoil, error, message = BAD[name]
    spoil(folder)
    fresh = model()
    with left_as_it_was(fresh), pytest.raises(error, match=message):
        rw.load(fresh, folder)
    adapted = rw.attach(model(), rw.LoRA(rank=2, target_modules=["linear"]))
    with left_as_it_was(adapted), pytest.raises(error, match=message):  # beside another adapter too
        rw.load(adapted, folder, name="second")


# What only the model tells.
_FITS_ITSELF = {
    "a target missing", "an unknown module", "A too wide", "B too tall", "another kernel", "a name that climbs",
    "a linear in the place of a convolution", "dora without magnitudes",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_inspect_reports_what_load_refuses(name: str, folder: Path):
    spoil, error, _ = BAD[name]
    spoil(folder)
    found = inspect(folder)
    kinds = error if isinstance(error, tuple) else (error,)
    assert (
        not found.problems
        if name in _FITS_ITSELF
        else any(problem.startswith(f"{kind.__name__}: ") for kind in kinds for problem in found.problems)
    ), found.problems
    assert bool(found.engines) != bool(found.problems)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_sound_directory_loads(folder: Path):
    assert rw.pairs(rw.load(model(), folder))


def test_tensors_of_a_variant_that_the_config_does_not_name(folder: Path):
    """Magnitudes in the file, use_dora false: loading the rest would be another function."""
    tensors(_set("linear.lora_magnitude_vector", torch.ones(10)))(folder)
    fresh = model()
    with left_as_it_was(fresh), pytest.raises(CheckpointError, match=r"linear.*lora_magnitude_vector"):
        rw.load(fresh, folder)


def test_a_directory_that_is_not_there(tmp_path: Path):
    fresh = model()
    with left_as_it_was(fresh), pytest.raises(BrokenFile, match=r"nowhere.*no such file"):
        rw.load(fresh, tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------- another base


def test_another_bases_weights(folder: Path):
    other = model()
    with torch.no_grad():
        other.linear.weight.mul_(1.5)
    with (
        left_as_it_was(other),
        pytest.raises(BaseMismatch, match=r"base weights at linear differ by 50%.*≤ 2%.*allow_other_base=True"),
    ):
        rw.load(other, folder)
    rw.load(other, folder, allow_other_base=True)


def test_the_same_base_in_another_precision_is_no_other_base(folder: Path):
    rw.load(model().bfloat16(), folder)
    rw.load(model().double(), folder)


def test_a_base_of_other_shape_or_names(folder: Path):
    other = model()
    other.linear = nn.Linear(12, 11)
    with (
        left_as_it_was(other),
        pytest.raises(ShapeMismatch, match=r"linear is a linear of 10 × 12 in the file and a linear of 11 × 12"),
    ):
        rw.load(other, folder)
    other = model()
    other.linear = nn.Identity()
    with (
        left_as_it_was(other),
        pytest.raises(BaseMismatch, match=r"linear is a Identity here, which carries no adapter"),
    ):
        rw.load(other, folder)
    other = model()
    other.embedding = nn.Embedding(13, 8)
    with left_as_it_was(other), pytest.raises(ShapeMismatch, match=r"embedding is a embedding of 8 × 11"):
        rw.load(other, folder)


def test_the_probe_sees_the_pretrained_weights_whatever_the_anchor(tmp_path: Path):
    zoo = model()
    rw.attach(zoo, rw.LoRA(rank=2, init="pissa", anchor="fold", target_modules=["linear"]))
    rw.save(zoo, tmp_path)
    rw.load(model(), tmp_path)


# -------------------------------------------------------------------------------------------------------------- saving


def test_an_adapter_that_diverged_is_not_written(tmp_path: Path):
    zoo = rw.attach(model(), rw.LoRA(rank=2, target_modules=["linear", "wide"]))
    rw.save(zoo, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        rw.pairs(zoo)[1].parameters[0][0, 0] = float("nan")
    with pytest.raises(NonFiniteTensor, match=r"wide.lora_A.weight holds NaN.*was not written; the training diverged"):
        rw.save(zoo, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    zoo = rw.attach(model(), rw.LoRA(rank=2, target_modules=["linear"]))
    rw.save(zoo, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    perturb(zoo, 0.1)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        rw.save(zoo, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_the_adapter_is_written(tmp_path: Path):
    zoo = rw.attach(model(), rw.LoRA(rank=2, target_modules=["linear"]))
    rw.save(zoo, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "rankwise.json",
    ]
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in found.items()} == {
        KEY + "linear.lora_A.weight": (2, 12), KEY + "linear.lora_B.weight": (10, 2),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------- the state to resume from


def test_a_state_of_another_adapter_is_refused_whole(tmp_path: Path):
    zoo = rw.attach(model(), rw.LoRA(rank=2, target_modules=["linear", "wide"]))
    perturb(zoo, 0.1)
    save_state(zoo, tmp_path)
    cases = [
        (
            rw.LoRA(rank=3, target_modules=["linear", "wide"]),
            ShapeMismatch,
            r"linear.lora_A is \(2, 12\) torch.float32, expected \(3, 12\)",
        ),
        (
            rw.LoRA(rank=2, target_modules=["linear"]),
            UnexpectedTensor,
            r"has wide.lora_A \(2 in all\), which this adapter lacks",
        ),
        (
            rw.LoRA(rank=2, target_modules=["linear", "wide", "conv2d"]),
            MissingTensor,
            r"lacks conv2d.lora_A \(2 in all\)",
        ),
        (
            rw.LoRA(rank=2, init="pissa", target_modules=["linear", "wide"]),
            MissingTensor,
            r"lacks linear.start_A \(4 in all\)",
        ),
    ]
    for spec, error, message in cases:
        other = rw.attach(model(), spec)
        with left_as_it_was(other), pytest.raises(error, match=message):
            load_state(other, tmp_path)
    with pytest.raises(BrokenFile, match=r"rankwise_state.safetensors: no such file"):
        load_state(zoo, tmp_path / "nowhere")
