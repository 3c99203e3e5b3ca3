"""PEFT reads what we write, and we read what PEFT writes: same outputs on a clean base, both ways."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from zoo import DTYPES, LAYERS, PAIR_VARIANTS, TOLERANCE, Zoo, clone, perturb, relative, zoo_and_inputs

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import UnsupportedAdapter
from rankwise.inits import INITS
from rankwise.scaling import SCALINGS

pytestmark = [
    # GPT-2's Conv1D: PEFT sets fan_in_fan_out itself where a model mixes both kinds, and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
]

# PEFT's own convolution forgets these options of the base layer, so it computes another function than merging does.
PEFT_FORGETS = {
    "conv2d_dilated": "dilation",
    "conv2d_reflect": "padding_mode",
    "conv2d_circular": "padding_mode",
}
COMMON = [name for name in LAYERS if name not in PEFT_FORGETS]


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.eval()(**inputs).outputs


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, y in expected.items():
        assert relative(found[name], y) <= tolerance, f"{name}: off by {relative(found[name], y):.1e}"


@functools.cache
def served(init: str, variant: str) -> list[str]:
    zoo, _ = zoo_and_inputs()
    names = []
    for name in COMMON:
        try:
            rw.plan(zoo, rw.LoRA(rank=2, init=init, variant=variant, target_modules=[name]))
        except rw.errors.SpecError:
            continue
        names.append(name)
    return names


# ------------------------------------------------------------------------------------------- PEFT reads what we write


METHODS = [(init, variant, list(SCALINGS)[-1]) for init in INITS for variant in PAIR_VARIANTS]
METHODS += [("pissa", variant, scaling) for variant in PAIR_VARIANTS for scaling in list(SCALINGS)[:-1]]


@pytest.mark.parametrize(("init", "variant", "scaling"), METHODS)
def test_peft_reads_what_we_write(init: str, variant: str, scaling: Any, tmp_path: Path):
    """Every start, variant and scale, patterns included, on every kind of layer that PEFT knows."""
    names = served(init, variant)
    zoo, inputs = zoo_and_inputs(names=names)
    clean = clone(zoo)
    spec = rw.LoRA(
        rank=2, alpha=3, init=init, variant=variant, scaling=scaling, target_modules=names,
        rank_pattern={"wide": 3}, alpha_pattern={"conv2d": 5, "wide": 1.5},
    )  # fmt: skip
    original = {n: w + 0.01 * torch.randn_like(w) for n, w in rw.weights(clean, names).items()}
    evidence = {"evidence": original} if spec.init.needs == "weights" else {"batches": [inputs]}
    rw.attach(zoo, spec, **evidence)
    perturb(zoo, 0.2)
    expected = outputs(zoo, inputs)
    rw.save(zoo, tmp_path)
    peft = PeftModel.from_pretrained(clean, str(tmp_path))
    close(outputs(peft, inputs), expected, 5 * TOLERANCE[torch.float32])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True  # else a loader would redo a decomposition on the base


def _llama() -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _gpt2() -> nn.Module:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


BATCH = {"input_ids": torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(5))}
LABELLED = {**BATCH, "labels": BATCH["input_ids"]}

SPECS = {
    "kaiming": rw.LoRA(rank=4),
    "pissa": rw.LoRA(rank=4, init="pissa"),
    "lora-ga-rslora": rw.LoRA(rank=4, init="lora-ga", scaling="rslora"),
    "patterns": rw.LoRA(rank=4, alpha=8, init="pissa", rank_pattern={r".*0\..*proj": 2},
                        alpha_pattern={"c_attn|q_proj": 3}),
    "one-layer": rw.LoRA(rank=4, target_modules=r".*\.1\..*(q_proj|c_attn)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("build", [_llama, _gpt2], ids=["llama", "gpt2"])
def test_logits_of_a_language_model_through_peft(build, name: str, tmp_path: Path):
    spec = SPECS[name]
    if name == "patterns" and build is _gpt2:
        spec = rw.LoRA.from_dict({**spec.to_dict(), "rank_pattern": {r"0\.attn\.c_attn": 2}})
    model = build()
    with torch.no_grad():
        pretrained = model(**BATCH).logits
    rw.attach(model, spec, batches=[LABELLED])
    with torch.no_grad():
        assert (model(**BATCH).logits - pretrained).abs().max() == 0
        perturb(model, 0.1)
        expected = model(**BATCH).logits
        assert (expected - pretrained).abs().max() > 1e-3  # a hundred times what is allowed below
        rw.save(model, tmp_path)
        found = PeftModel.from_pretrained(build(), str(tmp_path))(**BATCH).logits
        assert (found - expected).abs().max() <= 1e-5
        assert (rw.load(build(), tmp_path)(**BATCH).logits - expected).abs().max() <= 1e-5


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    out=st.integers(2, 9),
    into=st.integers(2, 9),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([1, 3, 0.7, 32]),
    init=st.sampled_from(["kaiming", "init-b", "pissa", "olora"]),
    scaling=st.sampled_from(list(SCALINGS)),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_any_shape_rank_and_dtype_both_ways(out, into, rank, alpha, init, scaling, dtype, tmp_path: Path):
    rank = min(rank, out, into)
    base = nn.Sequential(nn.Linear(into, out)).to(dtype)
    x = torch.randn(3, into).to(dtype)
    ours = rw.attach(copy.deepcopy(base), rw.LoRA(rank=rank, alpha=alpha, init=init, scaling=scaling))
    perturb(ours, 0.3)
    rw.save(ours, tmp_path / "ours")
    peft = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"), autocast_adapter_dtype=False)
    peft = peft.to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        pieces = base(x).double().norm() + (ours(x).double() - base(x).double()).norm()
        error = (peft(x.to(torch.promote_types(dtype, torch.float32))).double() - ours(x).double()).norm()
        assert float(error / pieces) < {torch.float64: 1e-6}.get(dtype, 2 * TOLERANCE[dtype])
    peft.save_pretrained(str(tmp_path / "theirs"))
    again = rw.load(copy.deepcopy(base), tmp_path / "theirs")
    with torch.no_grad():
        error = (again(x).double() - ours(x).double()).norm()
        assert float(error / pieces) < {torch.float64: 1e-6}.get(dtype, TOLERANCE[dtype])


# ------------------------------------------------------------------------------------------- we read what PEFT writes


class Nested(nn.Module):
    """Layers at several depths whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 6), "up": nn.Linear(6, 6)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        for layer in self.layers:
            x = x + torch.tanh(layer["up"](layer["fc"](x)))
        return x


def _theirs(model: nn.Module, config: LoraConfig, where: Path, seed: int = 2) -> PeftModel:
    """A PEFT adapter with every tensor moved, saved."""
    peft = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(str(where))
    return peft.eval()


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"wide": 3, "^conv2d$": 4}, "alpha_pattern": {"linear": 7, "embedding": 2}},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.4},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["linear", "wide", "linear_without_bias"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_what_peft_writes(name: str, tmp_path: Path):
    names = [n for n in COMMON if "grouped" not in n]
    zoo, inputs = zoo_and_inputs(names=names)
    fields = {"r": 2, "lora_alpha": 3, "target_modules": names, **CONFIGS[name]}
    if name == "dora":
        fields["target_modules"] = [n for n in names if n != "embedding_scaled"]  # PEFT forgets embed_scale with DoRA
    if name == "pissa":  # PEFT changes the base; it subtracts that again on saving, where told to
        peft = get_peft_model(clone(zoo), LoraConfig(**fields))
        peft.peft_config["default"].init_lora_weights = True
        peft.save_pretrained(str(tmp_path / "start"))
        peft.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for parameter_name, parameter in peft.named_parameters():
                if "lora_" in parameter_name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        expected = outputs(peft, inputs)
        peft.save_pretrained(str(tmp_path), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        tolerance = 1e-4  # of PEFT's W − BA + BA
    else:
        expected = outputs(_theirs(zoo, LoraConfig(**fields), tmp_path), inputs)
        tolerance = 5 * TOLERANCE[torch.float32]
    before = outputs(zoo, inputs)
    ours = rw.load(clone(zoo), tmp_path)
    close(outputs(ours, inputs), expected, tolerance)
    assert any(relative(y, before[n]) > 0.01 for n, y in outputs(ours, inputs).items())
    rw.merge(ours)
    close(outputs(ours, inputs), expected, tolerance)
    rw.save(rw.unmerge(ours), tmp_path / "again")
    close(outputs(PeftModel.from_pretrained(clone(zoo), str(tmp_path / "again")), inputs), expected, tolerance)


def test_a_loaded_adapter_has_pefts_dropout_in_training(tmp_path: Path):
    zoo, _ = zoo_and_inputs(names=["linear"])
    _theirs(zoo, LoraConfig(r=2, target_modules=["linear"], lora_dropout=0.4), tmp_path)
    ours = rw.load(zoo, tmp_path, trainable=True)
    assert Adapted.of(ours).adapter_layers("default")["linear"].dropout == 0.4


@pytest.mark.parametrize("build", [_llama, _gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_of_a_language_model_from_peft(build, rslora: bool, tmp_path: Path):
    targets = ["q_proj", "down_proj", "embed_tokens"] if build is _llama else ["c_attn", "mlp.c_proj", "wte"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, fan_in_fan_out=build is _gpt2,
        rank_pattern={r"1\..*": 3}, alpha_pattern={r"0\..*": 5}, task_type="CAUSAL_LM",
    )  # fmt: skip
    peft = _theirs(build(), config, tmp_path)
    with torch.no_grad():
        expected = peft(**BATCH).logits
        assert (rw.load(build(), tmp_path)(**BATCH).logits - expected).abs().max() <= 1e-5


SELECTIONS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["fc"]},
    "regex": {"target_modules": r"layers\.\d\.fc"},
    "exclude": {"target_modules": ["fc"], "exclude_modules": ["layers.1.fc"]},
    "exclude-regex": {"target_modules": ["fc", "up"], "exclude_modules": r"layers\.[01]\..*"},
    "some-layers": {"target_modules": ["fc"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one-layer": {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "layers"},
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_way_that_peft_selects_modules(name: str, tmp_path: Path):
    model, x = Nested(), torch.randn(4, 6)
    expected = _theirs(model, LoraConfig(r=2, **SELECTIONS[name]), tmp_path)(x).detach()
    torch.testing.assert_close(rw.load(model, tmp_path)(x).detach(), expected)


@pytest.mark.parametrize("targets", ["fc", r"(fc|layers\.1\.fc)", r"layers\.0\..*", r".*fc"])
def test_names_that_end_alike_select_the_same_sites_again(targets: str, tmp_path: Path):
    """`fc` alone also names `layers.0.fc` in a list: the file must not promise more than it holds."""
    model, x = Nested(), torch.randn(4, 6)
    ours = rw.attach(copy.deepcopy(model), rw.LoRA(rank=2, target_modules=targets))
    perturb(ours, 0.3)
    expected = ours(x).detach()
    rw.save(ours, tmp_path)
    again = rw.load(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(again(x).detach(), expected)
    assert [p.name for p in rw.pairs(again)] == [p.name for p in rw.pairs(ours)]
    peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    torch.testing.assert_close(peft(x).detach(), expected)
    adapted = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {p.name for p in rw.pairs(ours)}


def test_a_grouped_convolution_that_mixes_groups_is_refused(tmp_path: Path):
    """PEFT's lora_A sees the channels of all groups: no grouped weight can hold that."""
    zoo, _ = zoo_and_inputs(names=["conv2d_grouped"])
    _theirs(zoo, LoraConfig(r=4, target_modules=["conv2d_grouped"]), tmp_path)
    with pytest.raises(UnsupportedAdapter, match=r"conv2d_grouped: its lora_A mixes channels across the 2 groups"):
        rw.load(zoo, tmp_path)


@pytest.mark.parametrize("name", PEFT_FORGETS)
def test_peft_still_forgets_these_options(name: str, tmp_path: Path):
    """Why they are left out above. Where PEFT starts to heed them this fails: take them back in."""
    zoo, inputs = zoo_and_inputs(names=[name])
    ours = rw.attach(clone(zoo), rw.LoRA(rank=2, target_modules=[name]))
    perturb(ours, 0.3)
    rw.save(ours, tmp_path)
    expected = outputs(ours, inputs)[name]
    try:
        found = outputs(PeftModel.from_pretrained(clone(zoo), str(tmp_path)), inputs)[name]
    except RuntimeError:  # of a shape that does not fit
        return
    assert relative(found, expected) > 1e-3


def test_the_zoo_is_whole():
    assert set(PEFT_FORGETS) < set(LAYERS)
    assert isinstance(Zoo(), nn.Module)
