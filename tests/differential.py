"""Random adapters between PEFT and rankwise, both ways: the same outputs, or a refusal by name.

A case is a number: model, configuration and values follow from it, so that any can be repeated alone.
"""

import copy
import random
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from peft_written import gpt2, llama, perturb_peft
from torch import Tensor, nn
from zoo import perturb

import rankwise as rw
from rankwise.errors import CheckpointError, RankwiseError, SpecError, TargetError
from rankwise.inspection.inspection import inspect

TOLERANCE = 1e-5  # of the largest output, or of 1
Fields = dict[str, Any]


class Stack(nn.Module):
    """Linear layers under an embedding, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed_tokens = nn.Embedding(32, 12)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12, bias=False), nn.LayerNorm(12))
        self.score = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.body(self.embed_tokens(ids)))


class Lists(nn.Module):
    """Numbered lists, one inside the other, whose layers' names end alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed_tokens, self.fc, self.score = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(8, 8), "experts": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
            for _ in range(3)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.embed_tokens(ids))
        for layer in self.layers:
            x = x + torch.tanh(layer["fc"](x)) + layer["experts"][1](layer["experts"][0](x))
        return self.score(x)


class Images(nn.Module):
    """Convolutions with strides, padding and groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed_tokens = nn.Embedding(32, 8)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, padding=1, stride=2)}) for _ in range(2))
        self.score = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.stem(self.embed_tokens(ids).unflatten(1, (2, -1)))
        for block in self.blocks:
            x = torch.tanh(block["conv"](x))
        return self.score(x.mean((2, 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "stack": Stack,
    "lists": Lists,
    "convolutions": Images,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
}
_LANGUAGE = ("llama", "llama-tied", "gpt2")


def run(model: nn.Module) -> Tensor:
    """The outputs of a model for the ids that every case has."""
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        y = model.eval()(ids)
    return y if isinstance(y, Tensor) else y.logits


def _layers(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    named = model.named_modules()
    return [path for path, module in named if isinstance(module, kinds) or type(module).__name__ == "Conv1D"]


@dataclass(frozen=True)
class Draw:
    """What a case's random choices are made from."""

    rng: random.Random
    name: str
    layers: list[str]

    def ends(self, most: int = 3) -> list[str]:
        """Ends of layers' names, of one part or more."""
        chosen = self.rng.sample(self.layers, min(self.rng.randint(1, most), len(self.layers)))
        return sorted({".".join(path.split(".")[-self.rng.choice((1, 1, 2, 9)) :]) for path in chosen})

    def key(self) -> str:
        """A key of a pattern: an end, a whole path, or a regular expression."""
        path = self.rng.choice(self.layers)
        end = path.rpartition(".")[2]
        return self.rng.choice((end, f"^{path}", re.escape(path), rf".*\.{end}", rf"\d+\..*{end}", f"{end}|nothing"))


def _targets(draw: Draw) -> Any:
    kind = draw.rng.choice(("ends", "ends", "regex", "everything", "all-linear"))
    if kind == "all-linear" and draw.name in _LANGUAGE:
        return "all-linear"
    if kind == "everything":
        return "|".join(map(re.escape, draw.layers))
    return draw.ends() if kind == "ends" else rf"(.*\.)?({'|'.join(map(re.escape, draw.ends()))})"


# What is turned in a configuration, beside rank, alpha and targets. Each case has one by its number, and others.
TWISTS: dict[str, Callable[[Draw], Fields]] = {
    "plain": lambda draw: {},
    "rslora": lambda draw: {"use_rslora": True},
    "dora": lambda draw: {"use_dora": True},
    "start": lambda draw: {"init_lora_weights": draw.rng.choice((True, False, "gaussian", "orthogonal", "mica"))},
    "pissa": lambda draw: {"init_lora_weights": "pissa"},
    "olora": lambda draw: {"init_lora_weights": "olora"},
    "random start": lambda draw: {"init_lora_weights": "pissa_niter_2"},
    "eva": lambda draw: {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "ranks": lambda draw: {"rank_pattern": {draw.key(): draw.rng.randint(1, 4), draw.key(): 2}},
    "alphas": lambda draw: {"alpha_pattern": {draw.key(): draw.rng.choice((0.5, 3, 16)), draw.key(): 5}},
    "exclude": lambda draw: {"exclude_modules": draw.rng.choice((draw.ends(2), rf".*{draw.ends(1)[0]}"))},
    "numbers": lambda draw: {"layers_to_transform": draw.rng.choice((0, [1], [0, 1])), "target_modules": draw.ends()},
    "lists": lambda draw: {
        "layers_to_transform": draw.rng.choice((1, [0])), "target_modules": draw.ends(),
        "layers_pattern": draw.rng.choice(("layers", ["h", "layers"], ["blocks", "experts"])),
    },
    "whole": lambda draw: {"modules_to_save": draw.rng.choice((["score"], ["lm_head"], ["lm_head", "embed_tokens"]))},
    "whole anywhere": lambda draw: {"modules_to_save": draw.ends(1)},
    "bias": lambda draw: {"bias": draw.rng.choice(("all", "lora_only"))},
    "lora_bias": lambda draw: {"lora_bias": True},
    "fan_in_fan_out": lambda draw: {"fan_in_fan_out": draw.rng.choice((True, False))},
    "parameters": lambda draw: {"target_parameters": [f"{draw.rng.choice(draw.layers)}.weight"]},
    "tokens": lambda draw: {"trainable_token_indices": {"embed_tokens": [1, 3]}},
    "tying": lambda draw: {"ensure_weight_tying": True},
    "dropout": lambda draw: {"lora_dropout": 0.3},
    "runtime": lambda draw: {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True), "inference_mode": True},
    "replication": lambda draw: {"layer_replication": [[0, 2], [1, 2]]},
    "activated": lambda draw: {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
    "task": lambda draw: {"task_type": "CAUSAL_LM" if draw.name in _LANGUAGE else "FEATURE_EXTRACTION"},
    "kasa": lambda draw: {"kasa_config": {}},
    "bdlora": lambda draw: {"use_bdlora": {"target_modules_bd_a": draw.ends(1), "nblocks": 2, "match_strict": False}},
}  # fmt: skip
SPECIAL = ("random start", "lora_bias", "parameters", "tokens", "replication", "activated", "kasa", "bdlora")


def configuration(number: int, draw: Draw) -> Fields:
    """PEFT's fields of a case."""
    names = list(TWISTS)
    ordinary = [name for name in names if name not in SPECIAL]
    chosen = [names[number % len(names)], *draw.rng.sample(ordinary, draw.rng.choice((0, 1, 1, 2)))]
    fields: Fields = {
        "r": draw.rng.randint(1, 4),
        "lora_alpha": draw.rng.choice((1, 3, 8)),
        "target_modules": _targets(draw),
    }
    for name in chosen:
        fields |= TWISTS[name](draw)
    return fields


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        kind: "equal"; "refused" by us, by name; "not made": PEFT, or our attach, would not make such an adapter.
        what: the error, if any.
    """

    kind: str
    what: str = ""


class Differs(AssertionError):
    """Two readers of one file compute different functions, or disagree about whether it can be read."""


def _compare(case: str, found: Tensor, expected: Tensor) -> None:
    gap = float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    if not gap <= TOLERANCE:
        raise Differs(f"{case}: outputs differ by {gap:.1e}")


def _check_refusal(case: str, message: str, problems: tuple[str, ...], names: Iterable[str]) -> None:
    """A refusal names an entry or a module, and what a configuration alone tells of, inspect tells of too."""
    if not any(name in message for name in names):
        raise Differs(f"{case}: a refusal that names neither an entry nor a module: {message}")
    if message.startswith("/adapter_config.json") and not problems:
        raise Differs(f"{case}: inspect does not say what load refuses: {message}")


def _draw(number: int, ours: bool) -> tuple[Draw, nn.Module]:
    rng = random.Random(f"{number} {ours}")
    name = list(MODELS)[number % len(MODELS)] if ours else rng.choice(list(MODELS))
    base = MODELS[name]()
    return Draw(rng, name, _layers(base)), base


def read_theirs(number: int, folder: Path) -> Outcome:
    """PEFT writes; what it reads from its own file is what we must read from it."""
    draw, base = _draw(number, ours=False)
    fields = configuration(number, draw)
    case = f"case {number}: {draw.name}, {fields}"
    torch.manual_seed(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
            perturb_peft(peft, 0.1)
            peft.save_pretrained(str(folder))
            expected = run(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)))
        except Exception as error:  # noqa: BLE001  # whatever PEFT raises
            return Outcome("not made", f"{type(error).__name__}: {error}")
    report = inspect(folder)
    try:
        ours = rw.load(copy.deepcopy(base), folder)
    except CheckpointError as error:
        message = str(error).replace(str(folder), "")
        _check_refusal(case, message, report.problems, (*fields, *draw.layers))
        return Outcome("refused", f"{type(error).__name__}: {message}")
    if report.problems:
        raise Differs(f"{case}: load reads what inspect refuses: {report.problems}")
    _compare(case, run(ours), expected)
    rw.save(ours, folder / "again")
    _compare(f"{case}, read again", run(rw.load(copy.deepcopy(base), folder / "again")), expected)
    return Outcome("equal")


def _spec(draw: Draw) -> Mapping[str, Any]:
    rng = draw.rng
    fields: Fields = {
        "rank": rng.randint(1, 4), "alpha": rng.choice((1, 3, 8, 0.7)), "target_modules": _targets(draw),
        "init": rng.choice(("kaiming", "gaussian", "init-b", "pissa", "olora", "milora")),
        "scaling": rng.choice(("lora", "rslora")), "variant": rng.choice(("lora", "lora", "dora")),
        "dropout": rng.choice((0.0, 0.3)),
    }  # fmt: skip
    turns: list[Fields] = [
        {"rank_pattern": {draw.key(): rng.randint(1, 4)}},
        {"alpha_pattern": {draw.key(): 5}},
        {"exclude_modules": draw.ends(1)},
        {"modules_to_save": draw.ends(1)},
        {"modules_to_save": [rng.choice(("score", "lm_head", "embed_tokens"))]},
    ]
    for turn in rng.sample(turns, rng.choice((0, 0, 1, 2))):
        fields |= turn
    return fields


def read_ours(number: int, folder: Path) -> Outcome:
    """We write; PEFT must read what the model that was saved computes."""
    draw, base = _draw(number, ours=True)
    fields = _spec(draw)
    case = f"case {number}: {draw.name}, {dict(fields)}"
    try:
        model = rw.attach(copy.deepcopy(base), rw.LoRA(**fields))
    except (SpecError, TargetError) as error:
        return Outcome("not made", f"{type(error).__name__}: {error}")
    torch.manual_seed(number)
    perturb(model, 0.1)
    expected = run(model)
    try:
        rw.save(model, folder)
    except RankwiseError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    if problems := inspect(folder).problems:
        raise Differs(f"{case}: inspect refuses what save wrote: {problems}")
    _compare(f"{case}, by rankwise", run(rw.load(copy.deepcopy(base), folder)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    _compare(f"{case}, by PEFT", run(theirs), expected)
    return Outcome("equal")


def outcomes(direction: str, numbers: Iterable[int]) -> "Counter[str]":
    """How many cases ended how, the refusals by the entry that they name first.

    Raises:
        Differs: two readers of one file do not agree.
    """
    counts: Counter[str] = Counter()
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            outcome = DIRECTIONS[direction](number, Path(folder))
        counts[outcome.kind] += 1
        if outcome.kind == "refused":
            counts[f"refused: {_reason(outcome.what)}"] += 1
    return counts


def _reason(message: str) -> str:
    """The entry or the kind of error that a refusal is for."""
    entry = re.search(r"adapter_config\.json: (\w+) is ", message)
    return entry[1] if entry else message.partition(":")[0]


DIRECTIONS: dict[str, Callable[[int, Path], Outcome]] = {
    "PEFT writes, rankwise reads": read_theirs,
    "rankwise writes, PEFT reads": read_ours,
}
