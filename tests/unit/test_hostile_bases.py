"""A base model's directory may be a stranger's: what it asks for beyond its own safetensors and JSON is refused."""

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama

import rankwise as rw
from rankwise.errors import BrokenFile, PretrainedError, RankwiseError, UnsafeFile
from rankwise.train.model.pretrained import load_classifier, load_pretrained


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def payload(tmp_path: Path) -> Callable[[Path], None]:
    """Write a pickle that leaves a trace where it is opened."""

    class Trace:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    return lambda path: path.write_bytes(pickle.dumps(Trace()))  # type: ignore[return-value]


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def reconfigure(base: Path, **fields: Any) -> None:
    write(base / "config.json", {**json.loads((base / "config.json").read_text()), **fields})


def test_an_adapter_in_the_base_is_not_put_on_it(base: Path, tmp_path: Path):
    model, _ = load_pretrained(base)
    rw.attach(model, rw.LoRA(rank=2))
    rw.save(model, tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        file.rename(base / file.name)
    for load in (lambda: load_pretrained(base), lambda: load_classifier(base, ["a", "b"])):
        with pytest.raises(
            PretrainedError, match=r"found an adapter \(adapter_config.json\), which transformers would"
        ):
            load()


def test_nor_one_of_a_model_in_the_hubs_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same gate, whatever the base is called by."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--me--it" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    (cache / "models--me--it" / "refs").mkdir()
    (cache / "models--me--it" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    load_pretrained("me/it")
    write(snapshot / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "me/it"})
    with pytest.raises(PretrainedError, match="me/it: expected a pretrained model, found an adapter"):
        load_pretrained("me/it")
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "model.safetensors").unlink()
    write(snapshot / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"x": "pytorch_model.bin"}})
    with pytest.raises(UnsafeFile, match=r"names 'pytorch_model.bin'"):
        load_pretrained("me/it")


@pytest.mark.parametrize(
    "shard", ["model.bin", "weights.pt", "../other/model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", 3]
)
def test_an_index_that_names_anything_but_safetensors_beside_it(base: Path, shard: Any, payload: Any, tmp_path: Path):
    (base / "model.safetensors").unlink()
    payload(base / "model.bin")
    write(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": shard}})
    with pytest.raises(UnsafeFile, match=r"names .* a pickle can run code"):
        load_pretrained(base)
    assert not (tmp_path / "ran").exists()


def test_an_index_of_pickles_is_not_opened(base: Path, payload: Any, tmp_path: Path):
    (base / "model.safetensors").unlink()
    payload(base / "pytorch_model-1.bin")
    write(base / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": {"x": "pytorch_model-1.bin"}})
    with pytest.raises(PretrainedError, match=r"model\.safetensors"):
        load_pretrained(base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("weights", ["adapter_model.bin", "x.bin", "../x.safetensors", ["x"], "deep/x.index.json"])
def test_a_configuration_that_names_other_weights(base: Path, weights: Any, payload: Any, tmp_path: Path):
    payload(base / "adapter_model.bin")
    reconfigure(base, transformers_weights=weights)
    with pytest.raises(UnsafeFile, match="transformers_weights names"):
        load_pretrained(base)
    assert not (tmp_path / "ran").exists()


def test_the_index_that_a_configuration_names_is_looked_into(base: Path):
    reconfigure(base, transformers_weights="other.safetensors.index.json")
    write(base / "other.safetensors.index.json", {"metadata": {}, "weight_map": {"x": "model.bin"}})
    with pytest.raises(UnsafeFile, match=r"other\.safetensors.index.json names 'model\.bin'"):
        load_pretrained(base)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": {"": "paged|me/kernel@main"}},
        {"text_config": {"_attn_implementation": "me/kernel"}},
    ],
)
def test_a_configuration_that_names_code_on_the_hub(base: Path, fields: dict[str, Any]):
    reconfigure(base, **fields)
    with pytest.raises(UnsafeFile, match="code that would be fetched from the hub and run"):
        load_pretrained(base)


def test_shards_that_are_pipes_or_absent(base: Path):
    (base / "model.safetensors").unlink()
    write(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"x": "a.safetensors"}})
    with pytest.raises(BrokenFile, match=r"a\.safetensors: no such file"):
        load_pretrained(base)
    os.mkfifo(base / "a.safetensors")
    with pytest.raises(BrokenFile, match=r"a\.safetensors: no such file"):
        load_pretrained(base)


def test_shards_are_loaded(base: Path):
    (base / "model.safetensors").rename(base / "part.safetensors")
    names = list(load_file(base / "part.safetensors"))
    write(
        base / "model.safetensors.index.json", {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    )
    load_pretrained(base)


SPOILT: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[1, 2]",
    "a string": b'"x"',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "not text": b"\xff\xfe\x00",
    "a huge number": b'{"vocab_size": ' + b"9" * 10_000 + b"}",
    "a key twice": b'{"model_type": "llama", "model_type": "gpt2"}',
    "numbers that are none": b'{"model_type": "llama", "hidden_size": "x", "num_hidden_layers": -1}',
    "zeros": b'{"model_type": "llama", "hidden_size": 0, "num_attention_heads": 0, "vocab_size": 0}',
    "no layers that are": b'{"model_type": "llama", "hidden_size": 32, "layer_types": [1, {}], "rope_parameters": 7}',
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", SPOILT.values(), ids=SPOILT)
def test_spoilt_files_end_in_a_named_error_or_are_not_used(base: Path, name: str, content: bytes):
    (base / name).write_bytes(content)
    began = time.process_time()
    try:
        load_pretrained(base)
    except RankwiseError as error:
        assert str(base) in str(error)
    else:
        assert name != "config.json"
    assert time.process_time() - began < 20


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "directory"])
def test_what_is_no_file(base: Path, name: str, kind: str):
    (base / name).unlink(missing_ok=True)
    if name == "model.safetensors.index.json":
        (base / "model.safetensors").unlink()
    make: dict[str, Callable[[], None]] = {
        "pipe": lambda: os.mkfifo(base / name),
        "loop": lambda: (base / name).symlink_to(name),
        "directory": lambda: (base / name).mkdir(),
    }
    make[kind]()
    with pytest.raises(RankwiseError, match=str(base)):
        load_pretrained(base)


@pytest.mark.parametrize(
    "name", ["a" * 5000, "a\0b", "../..", "/", "", " ", "a/b/c", "\ud800", "https://x/y", "\x1b[2J"]
)
def test_names_that_are_none(name: str):
    with pytest.raises(RankwiseError):
        load_pretrained(name)
