"""Biases, single tokens and numbered layers: PEFT reads what we write, we read what PEFT writes, the base stays."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_written import IDS, SAID, gpt2, llama, outputs, written
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

import rankwise as rw
from rankwise.errors import AttachError, BaseMismatch, MissingTensor, SpecError, TargetError, UnsupportedAdapter
from rankwise.inspection.inspection import inspect

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID]


def biased_llama() -> nn.Module:
    model = llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gemma() -> nn.Module:
    """Its embedding multiplies what it looks up, and its head is tied."""
    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, Any]]] = {
    "biases-of-adapted": (biased_llama, ["q_proj", "up_proj"], {"bias": "lora_only"}),
    "all-biases": (biased_llama, ["q_proj"], {"bias": "all"}),
    "all-biases-of-gpt2": (gpt2, ["c_attn"], {"bias": "all"}),
    "adapted-of-gpt2": (gpt2, ["c_fc"], {"bias": "lora_only"}),
    "tokens": (llama, ["q_proj"], {"trainable_token_indices": [3, 60, 5]}),
    "tokens-by-name": (llama, ["q_proj"], {"trainable_token_indices": {"embed_tokens": [3, 60, 5]}}),
    "tokens-tied": (tied_llama, ["q_proj"], {"trainable_token_indices": [3, 60, 5]}),
    "tokens-of-gpt2": (gpt2, ["c_attn"], {"trainable_token_indices": [0, 63]}),
    "tokens-scaled": (gemma, ["q_proj"], {"trainable_token_indices": [3, 60, 5]}),
    "tokens-and-head": (llama, ["q_proj"], {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}}),
    "tokens-and-biases": (gpt2, ["c_attn"], {"trainable_token_indices": [1], "bias": "all"}),
    "one-layer": (llama, ["q_proj"], {"layers_to_transform": 1}),
    "named-layers": (llama, ["q_proj"], {"layers_to_transform": [0], "layers_pattern": "layers"}),
    "biases-of-one-layer": (biased_llama, ["v_proj"], {"bias": "lora_only", "layers_to_transform": [1]}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    make, targets, fields = CASES[request.param]
    return make(), {"target_modules": targets, **fields}


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(rw.trainable_parameters(model), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


def close(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=1e-5)


def test_the_laws(case: tuple[nn.Module, dict[str, Any]], tmp_path: Path) -> None:
    base, fields = case
    model, pretrained = deepcopy(base), outputs(base)
    clean = {key: value.clone() for key, value in base.state_dict().items()}
    rw.attach(model, rw.LoRA(rank=2, **fields))
    assert torch.equal(outputs(model), pretrained)
    train(model)
    trained = outputs(model)
    assert float((trained - pretrained).abs().max()) > 1e-3
    with rw.disabled(model):
        assert torch.equal(outputs(model), pretrained)

    rw.save(model, tmp_path)
    read = rw.load(deepcopy(base), tmp_path)
    assert torch.equal(outputs(read), trained)
    close(outputs(PeftModel.from_pretrained(deepcopy(base), str(tmp_path))), trained)
    _check_inspection(tmp_path, fields)
    rw.save(read, tmp_path / "again")
    first, second = (rw.read(where) for where in (tmp_path, tmp_path / "again"))
    assert first.saved.keys() == second.saved.keys()
    assert all(torch.equal(first.saved[key], second.saved[key]) for key in first.saved)

    rw.merge(model)
    close(outputs(model), trained)
    rw.unmerge(model)
    assert torch.equal(outputs(model), trained)
    kept = rw.detach(model).state_dict()
    assert kept.keys() == clean.keys()
    assert all(torch.equal(kept[key], value) for key, value in clean.items())


def _check_inspection(folder: Path, fields: dict[str, Any]) -> None:
    """Engines that read pairs alone are told apart from those that read the rest."""
    report = inspect(folder)
    assert not report.problems
    beside = {"bias", "trainable_token_indices"}.intersection(fields)
    assert bool(report.replaced) == bool(beside)
    answers = {verdict.engine: verdict.answer for verdict in report.engines}
    assert answers["PEFT"] == answers["rankwise"] == "yes"
    assert not beside or "yes" not in {answers[name] for name in answers.keys() - {"PEFT", "rankwise"}}


def test_we_read_what_peft_writes(case: tuple[nn.Module, dict[str, Any]], tmp_path: Path) -> None:
    base, fields = case
    theirs = outputs(written(base, tmp_path, r=2, **fields))
    ours = rw.load(deepcopy(base), tmp_path)
    close(outputs(ours), theirs)
    rw.save(ours, tmp_path / "ours")
    close(outputs(PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "ours"))), theirs)
    assert rw.evidence is not None and rw.read(tmp_path).spec.bias == fields.get("bias", "none")


def test_what_trains_is_what_peft_trains(case: tuple[nn.Module, dict[str, Any]], tmp_path: Path) -> None:
    """The same numbers, and no more: with the same pair and a step of SGD the two models stay the same."""
    base, fields = case
    theirs = written(base, tmp_path, r=2, **fields)
    ours = rw.load(deepcopy(base), tmp_path, trainable=True)
    theirs = PeftModel.from_pretrained(deepcopy(base), str(tmp_path), is_trainable=True)
    for model in (ours, theirs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        model.eval()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    close(outputs(ours), outputs(theirs))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]


def test_new_tokens_end_to_end(tmp_path: Path) -> None:
    """The vocabulary grows, the new tokens are trained and generated with, and a model grown anew has them."""
    base = tied_llama()

    def grown(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = deepcopy(base)
        model.resize_token_embeddings(66, mean_resizing=False)
        return model

    model = rw.attach(grown(0), rw.LoRA(rank=2, target_modules=["q_proj"], trainable_token_indices=[64, 65]))
    ids = torch.tensor([[64, 5, 65, 64, 5, 65, 64, 5, 65]])
    optimizer = torch.optim.Adam(rw.trainable_parameters(model), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    rw.save(model, tmp_path)
    read = rw.load(grown(1), tmp_path)
    for other in (read, PeftModel.from_pretrained(grown(2), str(tmp_path))):
        with torch.no_grad():
            close(other.eval()(input_ids=ids).logits, model.eval()(ids).logits)
    said = [m.generate(ids[:, :1], max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (model, read)]
    assert torch.equal(*said) and 65 in said[0]
    with pytest.raises(BaseMismatch, match=r"has 64 rows, found the id 65.*resize_token_embeddings\(66\)"):
        rw.load(deepcopy(base), tmp_path)


def test_a_resized_vocabulary_that_peft_saved_along(tmp_path: Path) -> None:
    base = tied_llama()
    base.resize_token_embeddings(66, mean_resizing=False)
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[64]))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    peft.save_pretrained(str(tmp_path), save_embedding_layers=True)
    close(outputs(rw.load(deepcopy(base), tmp_path)), outputs(peft))


def test_shared_embeddings_of_an_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.randint(0, 30, (2, 6)), "labels": torch.randint(0, 30, (2, 4))}

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**batch).logits

    pretrained = logits(base)
    spec = rw.LoRA(rank=2, target_modules=["q"], trainable_token_indices=list(range(10)))
    model = rw.attach(deepcopy(base), spec)
    assert torch.equal(logits(model), pretrained)
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    trained = logits(model)
    rw.save(model, tmp_path)
    close(logits(rw.load(deepcopy(base), tmp_path)), trained)
    rw.merge(model, keep_base=False)
    close(logits(model), trained)


def test_several_adapters(tmp_path: Path) -> None:
    base = gpt2()
    pretrained = outputs(base)
    model = rw.attach(deepcopy(base), rw.LoRA(rank=2, target_modules=["c_attn"], bias="lora_only"), name="one")
    train(model)
    one = outputs(model)
    rw.attach(model, rw.LoRA(rank=2, target_modules=["c_fc"], bias="all", modules_to_save=["ln_f"]), name="two")
    assert torch.equal(outputs(model), pretrained)
    train(model)
    two = outputs(model)
    for name, expected in (("one", one), ("two", two), ("one", one)):
        assert torch.equal(outputs(rw.activate(model, name)), expected)
        rw.save(model, tmp_path / name)
        assert torch.equal(outputs(rw.load(deepcopy(base), tmp_path / name)), expected)
    with pytest.raises(AttachError, match="each have a whole copy"):
        rw.activate(model, ["one", "two"])
    rw.detach(model, "two")
    assert torch.equal(outputs(model), one)
    assert torch.equal(outputs(rw.detach(model)), pretrained)


@pytest.mark.parametrize("variant", ["dora", "adalora"])
def test_beside_other_variants(variant: str, tmp_path: Path) -> None:
    base = gpt2()
    spec = rw.LoRA(rank=2, target_modules=["c_fc"], variant=variant, bias="lora_only", trainable_token_indices=[4])
    model = rw.attach(deepcopy(base), spec)
    train(model)
    rw.save(model, tmp_path)
    close(outputs(rw.load(deepcopy(base), tmp_path)), outputs(model))


def test_an_exact_state(tmp_path: Path) -> None:
    from rankwise.format.state import load_state, save_state

    spec = rw.LoRA(rank=2, target_modules=["c_fc"], bias="all", trainable_token_indices=[4, 1])
    models = [rw.attach(gpt2(), spec) for _ in range(2)]
    train(models[0])
    save_state(models[0], tmp_path)
    load_state(models[1], tmp_path)
    assert torch.equal(outputs(models[1]), outputs(models[0]))


def test_a_bottleneck_with_biases(tmp_path: Path) -> None:
    base = gpt2()
    model = rw.attach(deepcopy(base), rw.LoRA(rank=2, target_modules=["c_proj"], variant="bottleneck", bias="all"))
    train(model)
    rw.save(model, tmp_path)
    assert torch.equal(outputs(rw.load(deepcopy(base), tmp_path)), outputs(model))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no bias": ({"bias": "lora_only"}, TargetError, "expected a layer with a bias"),
    "a word": ({"bias": "some"}, SpecError, "bias must be one of none, lora_only, all"),
    "an id too far": ({"trainable_token_indices": [64]}, TargetError, r"resize_token_embeddings\(65\)"),
    "no id": ({"trainable_token_indices": []}, SpecError, "list of integers"),
    "a negative id": ({"trainable_token_indices": {"embed_tokens": [-1]}}, SpecError, "integers from 0 on"),
    "no such module": ({"trainable_token_indices": {"tokens": [1]}}, TargetError, "'tokens' is no module"),
    "no embedding": ({"trainable_token_indices": {"norm": [1]}}, TargetError, "expected an Embedding"),
    "adapted as well": ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, SpecError, "one of them"),
    "whole as well": ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, SpecError, "one of them"),
    "both by name": (
        {"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]},
        SpecError,
        "both name 'embed_tokens'",
    ),
    "behind a layer": ({"trainable_token_indices": [1], "variant": "bottleneck"}, SpecError, "changes weights"),
    "no such layer": ({"layers_to_transform": [0, 2]}, TargetError, "found none in layer 2"),
    "layers of an expression": ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, SpecError, "all-linear"),
    "lists without layers": ({"layers_pattern": "layers"}, SpecError, "says nothing without"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused(key: str) -> None:
    fields, error, said = REFUSED[key]
    model = llama()
    with pytest.raises(error, match=said):
        rw.attach(model, rw.LoRA(rank=2, **{"target_modules": ["q_proj"], **fields}))
    assert not rw.trainable_parameters(model) or all(p.requires_grad for p in model.parameters())


def test_files_that_lack_what_they_state(tmp_path: Path) -> None:
    base = gpt2()
    model = rw.attach(deepcopy(base), rw.LoRA(rank=2, target_modules=["c_fc"]))
    train(model)
    for fields, said in (({"bias": "all"}, "which bias 'all' asks for"), ({"trainable_token_indices": [1]}, "lacks")):
        rw.save(model, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        with pytest.raises(MissingTensor, match=said):
            rw.load(deepcopy(base), tmp_path)


def test_combining(tmp_path: Path) -> None:
    base = gpt2()
    adapters = []
    for bias, seed in (("all", 0), ("lora_only", 1)):
        torch.manual_seed(seed)
        model = rw.attach(deepcopy(base), rw.LoRA(rank=2, target_modules=["c_fc"], bias=bias, seed=seed))
        train(model)
        rw.save(model, tmp_path / bias)
        adapters.append(rw.read(tmp_path / bias))
    combined = rw.algebra.combine([(adapters[0], 0.25), (adapters[1], 0.5)], base=base).adapter
    name = "transformer.h.0.mlp.c_fc.bias"
    own = base.get_parameter(name).detach()
    expected = own + 0.25 * (adapters[0].saved[name] - own) + 0.5 * (adapters[1].saved[name] - own)
    torch.testing.assert_close(combined.saved[name], expected)
    rw.write(combined, tmp_path / "both")
    outputs(rw.load(deepcopy(base), tmp_path / "both"))
    tokens = rw.attach(deepcopy(base), rw.LoRA(rank=2, target_modules=["c_fc"], trainable_token_indices=[1]))
    rw.save(tokens, tmp_path / "tokens")
    with pytest.raises(UnsupportedAdapter, match="single tokens"):
        rw.algebra.combine([(rw.read(tmp_path / "tokens"), 1.0)])


def test_all_linear_in_some_layers() -> None:
    planned = rw.plan(biased_llama(), rw.LoRA(rank=2, layers_to_transform=[1], bias="lora_only"))
    assert len(planned) == 7 and all(".1." in site.name for site in planned)
    assert "trained beside: 7 biases, model.layers.1.self_attn.q_proj.bias the first" in str(planned)
