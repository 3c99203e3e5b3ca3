"""convert: the LoRA does what PEFT's own adapter of another kind does, within the error that is stated."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import relative

import rankwise as rw
from rankwise.algebra import convert
from rankwise.errors import BrokenFile, SpecError, UnsafeFile, UnsupportedAdapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "LoHaConfig": {"r": 3},
    "LoKrConfig": {"r": 3},
    "OFTConfig": {"r": 0, "oft_block_size": 4},
    "BOFTConfig": {"boft_block_size": 4},
    "IA3Config": {"feedforward_modules": ["0", "2"]},
    "VeraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 20},
    "HRAConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "C3AConfig": {"block_size": 4},
    "ShiraConfig": {"r": 2},
    "WaveFTConfig": {"n_frequency": 20},
    "DeloraConfig": {"r": 4},
    "LoraConfig": {"r": 3, "use_dora": True},
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.LayerNorm(16))


def trained(kind: str, folder: Path, targets: tuple[str, ...] = ("0", "2"), **options: Any) -> nn.Module:
    """A model with a moved adapter of this kind, which is saved as well."""
    config = getattr(peft, kind)(target_modules=list(targets), **KINDS[kind] | options)
    model = peft.get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def changes(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT's merge of the whole model changes."""
    before, after = base().state_dict(), copy.deepcopy(model).merge_and_unload().state_dict()
    return {name: after[name].double() - before[name].double() for name in before}


@pytest.mark.parametrize("kind", list(KINDS))
def test_at_full_rank_it_is_the_same_function(kind: str, tmp_path: Path):
    model, x = trained(kind, tmp_path / "peft"), torch.randn(5, 16)
    converted = convert(tmp_path / "peft", base(), error=0.0)
    assert converted.error < 1e-5 and not converted.left_out
    rw.write(converted.adapter, tmp_path / "lora")
    found = rw.load(base(), tmp_path / "lora")
    assert relative(found(x), model(x)) < 1e-4
    assert relative(found(x), base()(x)) > 1e-2


@pytest.mark.parametrize("kind", list(KINDS))
def test_at_a_rank_it_is_the_nearest_change_and_says_how_near(kind: str, tmp_path: Path):
    expected = changes(trained(kind, tmp_path))
    converted = convert(tmp_path, base(), rank=3)
    for path, site in converted.adapter.sites.items():
        change = expected[f"{path}.weight"]
        S = torch.linalg.svdvals(change)
        assert converted.errors[path] == pytest.approx(relative(site.delta.dense(), change), abs=1e-5)
        assert converted.errors[path] == pytest.approx(float(S[3:].norm() / S.norm()), abs=1e-5)


def test_a_bias_that_changes_is_named(tmp_path: Path):
    """IA³ behind a layer scales its output, bias included."""
    expected = changes(trained("IA3Config", tmp_path, feedforward_modules=["2"]))
    converted = convert(tmp_path, base(), error=0.0)
    assert dict(converted.left_out) == pytest.approx({"0.bias": float(expected["0.bias"].norm())}, rel=1e-5)
    assert max(converted.errors.values()) < 1e-5 < converted.error


def test_a_bf16_base_does_not_round_the_change(tmp_path: Path):
    expected = changes(trained("LoHaConfig", tmp_path))
    rounded = base().to(torch.bfloat16)
    converted = convert(tmp_path, rounded, error=0.0)
    for path, site in converted.adapter.sites.items():
        assert relative(site.delta.dense(), expected[f"{path}.weight"]) < 1e-4


def test_the_base_is_not_touched(tmp_path: Path):
    trained("OFTConfig", tmp_path)
    model = base()
    model[0].weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    convert(tmp_path, model, rank=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_modules_trained_whole_come_along(tmp_path: Path):
    model, x = trained("LoHaConfig", tmp_path / "peft", targets=("0",), modules_to_save=["3"]), torch.randn(5, 16)
    converted = convert(tmp_path / "peft", base(), error=0.0)
    assert converted.adapter.saved.keys() == {"3.weight", "3.bias"} and not converted.left_out
    rw.write(converted.adapter, tmp_path / "lora")
    assert relative(rw.load(base(), tmp_path / "lora")(x), model(x)) < 1e-4


def test_an_adapter_that_changes_no_weight_is_refused(tmp_path: Path):
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    llama = LlamaForCausalLM(config)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(copy.deepcopy(llama), prompt).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAdapter, match="'PROMPT_TUNING' changes no layer's weight"):
        convert(tmp_path, llama, rank=1)


def test_what_cannot_be_converted_is_refused(tmp_path: Path):
    trained("LoHaConfig", tmp_path)
    with pytest.raises(SpecError, match="found neither"):
        convert(tmp_path, base())
    with pytest.raises(UnsupportedAdapter, match="does not read it for this base"):
        convert(tmp_path, nn.Sequential(nn.Linear(3, 3)), rank=1)
    peft.get_peft_model(base(), peft.LNTuningConfig(target_modules=["3"])).save_pretrained(tmp_path / "norms")
    with pytest.raises(SpecError, match="no weight of a layer differs"):
        convert(tmp_path / "norms", base(), rank=1)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsafeFile, match="pickle"):
        convert(tmp_path, base(), rank=1)
    with pytest.raises(BrokenFile):
        convert(tmp_path / "nowhere", base(), rank=1)
