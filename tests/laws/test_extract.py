"""extract: at each site the nearest change of its rank, with the true error, and all that no LoRA holds by its name."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_llama import save_tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model
from typer.testing import CliRunner
from zoo import LAYERS, perturb, relative, zoo_and_inputs

import rankwise as rw
from rankwise.base_weights import Checkpoint
from rankwise.cli import app
from rankwise.errors import BaseMismatch, BrokenFile, NonFiniteTensor, SpecError, UnexpectedTensor
from rankwise.extracting import extract


@st.composite
def checkpoints(draw) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A fine-tuned and a base checkpoint; some of the tensors are alike."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    base, tuned = {}, {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.integers(1, 20)), draw(st.integers(1, 20))
        base[f"block.{i}.proj.weight"], base[f"block.{i}.norm.weight"] = drawn(*shape), drawn(shape[0])
    for name, tensor in base.items():
        tuned[name] = tensor + 0.1 * drawn(*tensor.shape) if draw(st.booleans()) or not tuned else tensor.clone()
    return tuned, base


@given(checkpoints(), st.integers(1, 8))
def test_each_site_is_the_nearest_of_its_rank_and_the_rest_is_named(pair: tuple[Any, Any], rank: int):
    tuned, base = pair
    changes = {name: tuned[name].double() - base[name].double() for name in base}
    extracted = extract(tuned, base, rank)
    changed = {name for name, change in changes.items() if change.any()}
    matrices = {name for name in changed if "proj" in name}
    assert {f"{path}.weight" for path in extracted.adapter.sites} == matrices
    assert dict(extracted.left_out) == pytest.approx(
        {n: float(changes[n].norm()) for n in changed - matrices}, rel=1e-5
    )
    lost = sum(float(changes[name].square().sum()) for name in changed - matrices)
    for name in matrices:
        path, S = name.removesuffix(".weight"), torch.linalg.svdvals(changes[name])
        site = extracted.adapter.sites[path].delta
        assert extracted.errors[path] == pytest.approx(relative(site.dense(), changes[name]), abs=1e-5)
        assert extracted.errors[path] == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-5)
        lost += float((changes[name] - site.dense().double()).square().sum())
    size = sum(float(changes[name].square().sum()) for name in changed)
    assert extracted.error == pytest.approx(math.sqrt(lost / size), abs=1e-5)


@given(checkpoints(), st.sampled_from([0.0, 0.05, 0.5]))
def test_no_site_loses_more_than_the_error(pair: tuple[Any, Any], error: float):
    extracted = extract(*pair, error=error)
    assert all(lost <= error + 1e-6 for lost in extracted.errors.values())


def merged(**spec: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A zoo whose weights were changed by an adapter, the zoo before, and inputs."""
    zoo, inputs = zoo_and_inputs(torch.float64)
    base = copy.deepcopy(zoo)
    rw.attach(zoo, rw.LoRA(**{"rank": 2, "target_modules": list(LAYERS)} | spec))
    perturb(zoo, 0.2)
    rw.merge(zoo, keep_base=False)
    return zoo, base, inputs


def test_a_merged_adapter_comes_back_on_every_kind_of_layer(tmp_path: Path):
    tuned, base, inputs = merged()
    extracted = extract(tuned, base, rank=2)
    assert extracted.error < 1e-6 and not extracted.left_out
    rw.write(extracted.adapter, tmp_path)
    rw.load(base, tmp_path)
    found, expected = base(**inputs).outputs, tuned(**inputs).outputs
    assert all(relative(found[name], y) < 1e-6 for name, y in expected.items())


def save_in_shards(tensors: dict[str, Tensor], folder: Path, count: int = 3) -> None:
    """As transformers saves a large model."""
    folder.mkdir()
    files: dict[str, str] = {}
    for shard in range(count):
        part = dict(list(tensors.items())[shard::count])
        files |= dict.fromkeys(part, f"model-{shard}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, folder / f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_files_in_shards_say_the_same_as_the_models(tmp_path: Path):
    tuned, base, _ = merged(init="pissa")
    save_in_shards(tuned.state_dict(), tmp_path / "tuned")
    save_in_shards(base.state_dict(), tmp_path / "base", count=2)
    expected = extract(tuned, base, rank=1)
    found = extract(tmp_path / "tuned", tmp_path / "base", rank=1, layout=base.to("meta"))
    assert found.errors == pytest.approx(expected.errors)
    assert found.adapter.targets == expected.adapter.targets
    for path, site in expected.adapter.sites.items():
        other = found.adapter.sites[path]
        assert (other.kind, other.kernel, other.groups) == (site.kind, site.kernel, site.groups)
        assert torch.equal(other.delta.B, site.delta.B) and torch.equal(other.delta.A, site.delta.A)
    assert found.adapter.base_probe == expected.adapter.base_probe


def test_the_probe_of_the_base_is_read_again(tmp_path: Path):
    tuned, base, _ = merged()
    rw.write(extract(tuned, base, rank=2).adapter, tmp_path)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(-1.0)
    with pytest.raises(BaseMismatch, match="differ by"):
        rw.load(base, tmp_path)


def test_without_a_model_names_tell_embeddings_from_linear_layers():
    base = {"model.embed_tokens.weight": torch.zeros(7, 3), "model.q_proj.weight": torch.zeros(4, 3)}
    tuned = {name: torch.randn(tensor.shape) for name, tensor in base.items()}
    sites = extract(tuned, base, rank=3).adapter.sites
    assert {path: site.kind for path, site in sites.items()} == {
        "model.embed_tokens": "embedding",
        "model.q_proj": "linear",
    }
    torch.testing.assert_close(sites["model.embed_tokens"].delta.dense(), tuned["model.embed_tokens.weight"].T)


def test_a_tied_embedding_changes_both_layers_that_have_it(tmp_path: Path):
    save_tiny_llama(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.embed_tokens.weight += torch.randn(len(tuned.model.embed_tokens.weight), 1)
    extracted = extract(tuned, base, rank=1)
    assert set(extracted.adapter.sites) == {"model.embed_tokens", "lm_head"}
    rw.write(extracted.adapter, tmp_path / "adapter")
    rw.load(base, tmp_path / "adapter")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(base(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_gpt2_whose_base_was_saved_without_its_head(tmp_path: Path):
    """Square Conv1D weights, and names without ``transformer.`` in one of the checkpoints."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=16)
    tuned = GPT2LMHeadModel(config).eval()
    GPT2Model.save_pretrained(tuned.transformer, tmp_path / "base")
    base = copy.deepcopy(tuned)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.dim() == 2:
                parameter += torch.randn(len(parameter), 1) @ torch.randn(1, parameter.shape[1])
    tuned.save_pretrained(tmp_path / "tuned")
    with torch.device("meta"):
        layout = GPT2LMHeadModel(config)
    extracted = extract(tmp_path / "tuned", tmp_path / "base", rank=1, layout=layout)
    assert extracted.error < 1e-5 and not extracted.left_out
    assert extracted.adapter.sites["transformer.h.0.attn.c_proj"].kind == "conv1d"
    by_name = extract(tmp_path / "tuned", tmp_path / "base", rank=1)
    for path, site in by_name.adapter.sites.items():
        assert site.kind == extracted.adapter.sites[f"transformer.{path}"].kind
    rw.write(extracted.adapter, tmp_path / "adapter")
    rw.load(base, tmp_path / "adapter")
    ids = torch.arange(11)[None]
    torch.testing.assert_close(base(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_no_lora_holds_is_named_or_taken_whole():
    base = {
        "proj.weight": torch.zeros(3, 2),
        "norm.weight": torch.ones(3),
        "norm.bias": torch.ones(3),
        "embed_tokens.weight": torch.ones(4, 2),
        "scale": torch.tensor(1.0),
        "gone.weight": torch.ones(2, 2),
        "experts": torch.zeros(2, 2, 2),
    }
    tuned = {
        "proj.weight": torch.ones(3, 2),
        "norm.weight": torch.tensor([1.0, 1.0, 4.0]),
        "norm.bias": torch.ones(3),
        "embed_tokens.weight": torch.ones(5, 2),
        "scale": torch.tensor(3.0),
        "head.weight": torch.full((2, 2), 2.0),
        "experts": torch.ones(2, 2, 2),
    }
    left_out = {
        "norm.weight": 3.0,
        "embed_tokens.weight": math.sqrt(2),
        "scale": 2.0,
        "gone.weight": 2.0,
        "head.weight": 4.0,
        "experts": math.sqrt(8),
    }
    extracted = extract(tuned, base, rank=1)
    assert dict(extracted.left_out) == pytest.approx(left_out)
    assert "left out" in str(extracted)
    whole = extract(tuned, base, rank=1, modules_to_save=["norm", "head"])
    assert dict(whole.left_out) == pytest.approx({n: s for n, s in left_out.items() if n[:4] not in ("norm", "head")})
    assert whole.adapter.saved.keys() == {"norm.weight", "norm.bias", "head.weight"}
    assert whole.adapter.spec.modules_to_save == ("norm", "head")


def test_norms_taken_whole_make_the_extracted_model_exact(tmp_path: Path):
    save_tiny_llama(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight += 0.1
        for name, parameter in tuned.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    ends = ["input_layernorm", "post_attention_layernorm", "model.norm"]
    rw.write(extract(tuned, base, error=1e-6, modules_to_save=ends).adapter, tmp_path / "adapter")
    rw.load(base, tmp_path / "adapter")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(base(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path: Path):
    base = {"proj.weight": torch.zeros(3, 2)}
    with pytest.raises(SpecError, match="found neither"):
        extract(base, base)
    with pytest.raises(SpecError, match="leave one out"):
        extract(base, base, rank=1, error=0.1)
    with pytest.raises(SpecError, match="no weight of a layer differs"):
        extract(base, base, rank=1)
    with pytest.raises(BaseMismatch, match="no tensor in common"):
        extract({"other.weight": torch.ones(2, 2)}, base, rank=1)
    with pytest.raises(NonFiniteTensor, match=r"the change of proj\.weight"):
        extract({"proj.weight": torch.full((3, 2), math.nan)}, base, rank=1)
    with pytest.raises(BrokenFile, match="no safetensors file"):
        extract(tmp_path, base, rank=1)
    for number in range(2):
        save_file(base, tmp_path / f"{number}.safetensors")
    with pytest.raises(UnexpectedTensor, match="expected it once"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(BrokenFile, match="names of files in its directory"):
        Checkpoint(tmp_path)


def test_the_command_extracts_from_directories(tmp_path: Path):
    save_tiny_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "tuned", max_shard_size="50KB")
    places = [str(tmp_path / "tuned"), str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["extract", *places, "--rank", "4"])
    assert done.exit_code == 0, done.output
    expected = extract(model, base, rank=4)
    assert f"{expected.error:.2%}" in done.output and "model.norm.weight" in done.output
    found = rw.read(tmp_path / "out")
    assert found.sites.keys() == expected.adapter.sites.keys() and found.base_model == str(tmp_path / "base")
    rw.load(base, tmp_path / "out")
    refused = CliRunner().invoke(
        app, ["extract", str(tmp_path / "no"), *places[1:3], str(tmp_path / "new"), "--rank", "1"]
    )
    assert refused.exit_code == 2 and not (tmp_path / "new").exists()


def test_what_the_adapter_says_of_its_base(tmp_path: Path):
    save_tiny_llama(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight += 1.0
    adapter = extract(tuned, base, rank=1).adapter
    assert (adapter.task_type, adapter.base_model) == ("CAUSAL_LM", str(tmp_path))
    tuned, zoo, _ = merged()
    sites = extract(tuned, zoo, rank=1).adapter.sites
    assert "dilation" in sites["conv2d_dilated"].unlike_peft and not sites["linear"].unlike_peft
    combined = rw.algebra.combine([(extract(tuned, zoo, rank=1).adapter, 1.0)]).adapter
    assert combined.sites["conv2d_dilated"].unlike_peft == sites["conv2d_dilated"].unlike_peft
