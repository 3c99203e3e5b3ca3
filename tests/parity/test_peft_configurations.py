"""What PEFT's entries mean: read as PEFT reads them, or refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_written import SAID, gpt2, llama, outputs, rewritten, stack, written
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from zoo import left_as_it_was, perturb

import rankwise as rw
from rankwise.errors import BaseMismatch, SpecError, UnexpectedTensor, UnsupportedAdapter
from rankwise.format.peft import read_adapter
from rankwise.inspection.inspection import inspect

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID]

# --------------------------------------------------------------------------- pairs that are relative to a changed base

RELATIVE: dict[str, tuple[Any, dict[str, Any]]] = {
    "pissa": (stack, {"init_lora_weights": "pissa"}),
    "olora": (stack, {"init_lora_weights": "olora"}),
    "with-an-embedding": (stack, {"init_lora_weights": "pissa", "target_modules": ["0", "1", "3"]}),
    "rslora-patterns": (
        stack,
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"3": 5}, "alpha_pattern": {"1": 7}},
    ),
    "dora": (stack, {"init_lora_weights": "pissa", "use_dora": True}),
    "olora-dora": (stack, {"init_lora_weights": "olora", "use_dora": True}),
    "llama": (llama, {"init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "gpt2": (gpt2, {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    # PEFT decomposes the transpose here, so that its start is no start; what it computes from the file is this still.
    "gpt2-olora": (gpt2, {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIVE)
def test_a_pair_that_is_relative_to_a_changed_base(name: str, tmp_path: Path):
    build, fields = RELATIVE[name]
    base = build()
    theirs = written(base, tmp_path, **{"r": 4, "lora_alpha": 6, "target_modules": ["1", "3", "4"], **fields})
    expected, before = outputs(theirs), outputs(base)
    assert (expected - before).abs().max() > 1e-3
    ours = rw.load(copy.deepcopy(base), tmp_path)
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    assert not inspect(tmp_path).problems
    rw.save(ours, tmp_path / "again")  # which is a change of the pretrained weights, in the standard form
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again"))
    assert (outputs(again) - expected).abs().max() <= 1e-5
    rw.merge(ours)
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    torch.testing.assert_close(outputs(rw.detach(ours)), before, rtol=0, atol=0)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_untrained_relative_pair_changes_nothing(start: str, tmp_path: Path):
    """Up to the rounding of the stored pair, which PEFT writes in the base's type."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        base = stack().to(dtype)
        written(base, tmp_path, size=0.0, r=4, target_modules=["1", "3", "4"], init_lora_weights=start)
        before = outputs(base)
        assert (outputs(rw.load(base, tmp_path)) - before).abs().max() <= tolerance * before.abs().max()


def test_what_needs_the_base_to_be_a_change(tmp_path: Path):
    written(stack(), tmp_path, r=4, target_modules=["1", "3", "4"], init_lora_weights="pissa")
    with pytest.raises(UnsupportedAdapter, match=r"relative to a base that init_lora_weights 'pissa' had changed"):
        read_adapter(tmp_path)
    report = inspect(tmp_path)
    assert report.relative_to == "pissa" and all(site.change is None for site in report.sites)
    answers = {verdict.engine: verdict.answer for verdict in report.engines}
    assert answers.pop("rankwise") == answers.pop("PEFT") == "yes" and set(answers.values()) == {"after export"}


# ------------------------------------------------------------------------------------------------------ refused by name

REFUSED: dict[str, dict[str, Any]] = {
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "a start of tomorrow": {"init_lora_weights": "cauchy"},
    "lora_bias": {"lora_bias": True},
    "parameters": {"target_parameters": ["experts.down_proj"]},
    "replication": {"layer_replication": [[0, 1], [0, 2]]},
    "alora": {"alora_invocation_tokens": [1]},
    "qalora": {"use_qalora": True},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "arrow": {"arrow_config": {"top_k": 3}},
    "kasa": {"kasa_config": {"beta": 1e-4}},
    "monteclora": {"monteclora_config": {"samples": 2}},
    "megatron": {"megatron_config": {"hidden_size": 3}},
    "an entry of tomorrow": {"use_spectral_mixing": 3},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_entry_that_changes_the_function_is_refused_by_name(name: str, tmp_path: Path):
    written(stack(), tmp_path, r=2, target_modules=["1"])
    rewritten(tmp_path, **REFUSED[name])
    model = stack()
    (entry, *_) = REFUSED[name]
    with left_as_it_was(model), pytest.raises(UnsupportedAdapter, match=entry):
        rw.load(model, tmp_path)
    (problem,) = inspect(tmp_path).problems
    assert problem.startswith("UnsupportedAdapter") and entry in problem


NEUTRAL: dict[str, dict[str, Any]] = {
    "nulls": {"bias": None, "lora_bias": None, "init_lora_weights": None, "use_dora": None, "modules_to_save": None},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "an entry of tomorrow that is off": {"use_spectral_mixing": None, "spectral_config": {}},
    "ties of an untied base": {"ensure_weight_tying": True},
    "of training": {"velora_config": {"scale": 1.0}, "inference_mode": False, "revision": "main"},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_entry_that_changes_nothing_is_taken(name: str, tmp_path: Path):
    base = stack()
    expected = outputs(written(base, tmp_path, r=2, target_modules=["1", "3"]))
    rewritten(tmp_path, **NEUTRAL[name])
    assert not inspect(tmp_path).problems
    assert (outputs(rw.load(base, tmp_path)) - expected).abs().max() <= 1e-5


# -------------------------------------------------------------------------------------------------- what is selected


class Nested(nn.Module):
    """Layers in numbered lists, one inside the other, whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.fc = nn.Embedding(64, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(8, 8), "experts": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
            for _ in range(3)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.embed(ids))
        for layer in self.layers:
            x = x + torch.tanh(layer["fc"](x)) + layer["experts"][1](layer["experts"][0](x))
        return x


SELECTING: dict[str, dict[str, Any]] = {
    "ends": {"target_modules": ["fc"]},
    "whole paths": {"target_modules": ["layers.1.fc", "layers.2.experts.0"]},
    "regex": {"target_modules": r"layers\.\d+\.(fc|experts\.0)"},
    "excluded": {"target_modules": ["fc", "experts.1"], "exclude_modules": ["layers.1.fc", "0.experts.1"]},
    "excluded by a regex": {"target_modules": ["fc", "experts.1"], "exclude_modules": r"layers\.[01]\..*"},
    "numbers": {"target_modules": ["fc", "experts.1"], "layers_to_transform": [0, 2]},
    "numbers in lists": {"target_modules": ["fc"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
    "a path needs no number": {"target_modules": ["fc", "layers.0.fc"], "layers_to_transform": [2]},
    "in no number": {"target_modules": ["fc", "embed", "layers.1.fc"], "layers_to_transform": [2]},
    "not in a module trained whole": {"target_modules": ["fc", "experts.1"], "modules_to_save": ["layers.2.fc"]},
}


@pytest.mark.parametrize("name", SELECTING)
def test_modules_are_selected_as_peft_selects_them(name: str, tmp_path: Path):
    base = Nested()
    theirs = written(base, tmp_path, size=0.2, r=2, **SELECTING[name])
    ours = rw.load(copy.deepcopy(base), tmp_path)
    assert (outputs(ours) - outputs(theirs)).abs().max() <= 1e-5
    adapted = [path for path, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert [pair.name for pair in rw.pairs(ours)] == adapted
    assert not inspect(tmp_path).problems


EVERYTHING = r"embed|fc|layers\..*(fc|experts\.\d)"
DESELECTED: dict[str, dict[str, Any]] = {
    "ends": {"target_modules": ["fc"]},
    "regex": {"target_modules": r".*\.fc"},
    "excluded": {"exclude_modules": ["embed"]},
    "excluded by a regex": {"exclude_modules": r"layers\.1\..*"},
    "numbers": {"target_modules": ["embed", "fc", "0", "1"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "a whole module": {"modules_to_save": ["experts.0"]},
}


@pytest.mark.parametrize("name", DESELECTED)
def test_tensors_that_the_configuration_does_not_select(name: str, tmp_path: Path):
    """PEFT leaves them aside, so that to apply them would be another function."""
    base = Nested()
    whole = outputs(written(base, tmp_path, size=0.2, r=2, target_modules=EVERYTHING))
    rewritten(tmp_path, **DESELECTED[name])
    model = Nested()
    with left_as_it_was(model), pytest.raises((UnexpectedTensor, BaseMismatch)):
        rw.load(model, tmp_path)
    assert any(problem.startswith("UnexpectedTensor") for problem in inspect(tmp_path).problems)
    if name != "a whole module":  # PEFT asks for that one's own tensors
        theirs = PeftModel.from_pretrained(base, str(tmp_path))
        assert (outputs(theirs) - whole).abs().max() > 1e-3


def test_all_linear_selects_linear_layers(tmp_path: Path):
    base = llama()
    expected = outputs(written(base, tmp_path / "a", r=2, target_modules="all-linear"))
    rewritten(tmp_path / "a", target_modules="all-linear")
    assert (outputs(rw.load(llama(), tmp_path / "a")) - expected).abs().max() <= 1e-5
    written(base, tmp_path / "b", r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    rewritten(tmp_path / "b", target_modules="all-linear")
    with left_as_it_was(base), pytest.raises(UnexpectedTensor, match=r"'all-linear' does not select in this model"):
        rw.load(base, tmp_path / "b")


@pytest.mark.parametrize("targets", [None, []])
def test_no_target_modules(targets: Any, tmp_path: Path):
    written(stack(), tmp_path, r=2, target_modules=["1"])
    rewritten(tmp_path, target_modules=targets)
    with pytest.raises(UnsupportedAdapter, match=r"target_modules is (None|\[\]).*write them there"):
        rw.load(stack(), tmp_path)
    assert any("target_modules" in problem for problem in inspect(tmp_path).problems)


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": ["0"]}, {"layers_to_transform": [0], "target_modules": "1|3"},
               {"layers_to_transform": [0], "layers_pattern": 3}],
)  # fmt: skip
def test_numbers_of_layers_that_cannot_be_used(fields: dict[str, Any], tmp_path: Path):
    written(stack(), tmp_path, r=2, target_modules=["1", "3"])
    rewritten(tmp_path, **fields)
    with pytest.raises(SpecError, match="layers_"):
        rw.load(stack(), tmp_path)
    assert any(problem.startswith("SpecError") for problem in inspect(tmp_path).problems)


SPELLINGS: dict[str, tuple[str, str]] = {
    "without the prefix": ("base_model.model.1.", "1."),
    "with half of it": ("base_model.model.1.", "model.1."),
    "a bare pair": ("1.lora_A.weight", "1.lora_A"),
    "a whole module's without the prefix": ("base_model.model.3.", "3."),
    "with an adapter's name": ("1.lora_B.weight", "1.lora_B.default.weight"),
    "a weight of an embedding's": ("0.lora_embedding_A", "0.lora_embedding_A.weight"),
}


@pytest.mark.parametrize("both", [False, True], ids=["instead", "both"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_names_that_peft_does_not_read(name: str, both: bool, tmp_path: Path):
    written(stack(), tmp_path, r=2, target_modules=["0", "1"], modules_to_save=["3"])
    path, (old, new) = tmp_path / "adapter_model.safetensors", SPELLINGS[name]
    tensors = load_file(path)
    renamed = {key.replace(old, new): tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors | renamed if both else renamed, path)
    model = stack()
    with left_as_it_was(model), pytest.raises(UnexpectedTensor, match="belongs to no adapter site, and PEFT would"):
        rw.load(model, tmp_path)
    assert any(problem.startswith("UnexpectedTensor") for problem in inspect(tmp_path).problems)


# ------------------------------------------------------------------------------------------- names that files have had


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.fc, self.score = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(torch.tanh(self.fc(self.embed(ids))))


def _renamed_tensors(where: Path, names: dict[str, str]) -> None:
    path = where / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({names.get(key, key): tensor for key, tensor in tensors.items()}, path)


@pytest.mark.parametrize("spelling", ["score.modules_to_save.weight", "score.modules_to_save.default.weight"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "by its task"])
def test_heads_as_older_releases_wrote_them(spelling: str, named: bool, tmp_path: Path):
    """The trained copy beside the original, and a head that only the task tells of."""
    base = Classifier()
    expected = outputs(written(base, tmp_path, r=2, target_modules=["fc"], modules_to_save=["score"]))
    prefix = "base_model.model."
    names = {f"{prefix}score.{part}": f"{prefix}{spelling.replace('weight', part)}" for part in ("weight", "bias")}
    _renamed_tensors(tmp_path, names)
    path = tmp_path / "adapter_model.safetensors"
    originals = {f"{prefix}score.original_module.{key}": value for key, value in base.score.state_dict().items()}
    save_file(load_file(path) | originals, path)
    rewritten(tmp_path, modules_to_save=["score"] if named else None, task_type="SEQ_CLS", bias=None)
    report = inspect(tmp_path)
    assert not report.problems and report.replaced == ("score",)
    assert (outputs(rw.load(copy.deepcopy(base), tmp_path)) - expected).abs().max() <= 1e-5


def _llava() -> nn.Module:
    torch.manual_seed(1)
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": 8, "patch_size": 4}  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=63)).eval()


def test_paths_that_transformers_renamed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """LLaVA's language model moved from language_model.model to model.language_model."""
    base = _llava()
    targets = r".*language_model.*\.(q_proj|down_proj)"
    expected = outputs(written(base, tmp_path, size=0.2, r=2, target_modules=targets))
    path = tmp_path / "adapter_model.safetensors"
    old = {
        key.replace("model.language_model.", "language_model.model."): value for key, value in load_file(path).items()
    }
    assert old.keys().isdisjoint(load_file(path))
    save_file(old, path)
    ours = rw.load(copy.deepcopy(base), tmp_path)
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    assert "4 modules have other names in this transformers, such as language_model.model.layers.0" in caplog.text
    assert (outputs(PeftModel.from_pretrained(base, str(tmp_path))) - expected).abs().max() <= 1e-5


class TwoHeads(Classifier):
    """DistilBERT's: PEFT takes "classifier" for the end of pre_classifier too."""

    def __init__(self) -> None:
        super().__init__()
        del self.score
        self.pre_classifier, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.pre_classifier(self.fc(self.embed(ids)))))


@pytest.mark.parametrize("names", [["classifier"], ["ssifier"], None])
def test_peft_takes_a_name_for_the_end_of_a_part(names: list[str] | None, tmp_path: Path):
    base = TwoHeads()
    theirs = written(base, tmp_path / "a", r=2, target_modules=["fc"], modules_to_save=names or ["classifier"])
    expected = outputs(theirs)
    if names is None:
        rewritten(tmp_path / "a", modules_to_save=None, task_type="SEQ_CLS")
    assert "base_model.model.pre_classifier.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    report = inspect(tmp_path / "a")
    assert not report.problems and set(report.replaced) == {"classifier", "pre_classifier"}
    ours = rw.load(copy.deepcopy(base), tmp_path / "a")
    assert (outputs(ours) - expected).abs().max() <= 1e-5
    rw.save(ours, tmp_path / "b")
    assert (outputs(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "b"))) - expected).abs().max() <= 1e-5


def test_peft_finds_what_it_takes_our_names_for(tmp_path: Path):
    base = TwoHeads()
    ours = rw.attach(copy.deepcopy(base), rw.LoRA(rank=2, target_modules=["fc"], modules_to_save=["classifier"]))
    perturb(ours, 0.1)
    rw.save(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert (outputs(theirs) - outputs(ours)).abs().max() <= 1e-5
    assert (outputs(rw.load(base, tmp_path)) - outputs(ours)).abs().max() <= 1e-5
