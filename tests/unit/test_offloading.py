"""Models whose tensors are elsewhere: what can work does, the rest is refused by the name of the tensor."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import perturb

import rankwise as rw
from rankwise.errors import AttachError

IDS = torch.arange(6)[None]
BATCH = {"input_ids": IDS, "labels": IDS}
SPECS = {
    "lora": rw.LoRA(rank=2),
    "dora": rw.LoRA(rank=2, variant="dora"),
    "adalora": rw.LoRA(rank=2, variant="adalora"),
    "gradients": rw.LoRA(rank=2, init="lora-ga"),
    "bottleneck": rw.Bottleneck(["o_proj", "down_proj"], width=2),
    "whole": rw.LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def adapted(spec: str = "lora") -> Any:
    model = rw.attach(tiny_llama(), SPECS[spec], batches=[BATCH])
    perturb(model)
    return model


def on_disk(model: nn.Module, folder: Path) -> Any:
    return disk_offload(model, str(folder / "weights"), execution_device=torch.device("cpu"))


def in_memory(model: nn.Module, folder: Path) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(model: nn.Module, folder: Path) -> Any:
    """In part on disk, as ``device_map`` does it where the model does not fit."""
    places = {"model.embed_tokens": "disk", "model.layers": "disk", "lm_head": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    return dispatch_model(model, places, offload_dir=str(folder / "weights"))


OFFLOAD = pytest.mark.parametrize("offload", [in_memory, on_disk, dispatched])


@OFFLOAD
@pytest.mark.parametrize("spec", SPECS)
def test_attach_to_an_offloaded_model(spec: str, offload: Callable[..., Any], tmp_path: Path) -> None:
    model = offload(tiny_llama(), tmp_path)
    before = logits(model)
    with pytest.raises(AttachError, match=r"^model\.embed_tokens\.weight: expected a tensor in memory"):
        rw.attach(model, SPECS[spec], batches=[BATCH])
    assert torch.equal(logits(model), before)
    assert rw.plan(model, SPECS[spec]).parameters == rw.plan(tiny_llama(), SPECS[spec]).parameters


@OFFLOAD
@pytest.mark.parametrize("spec", SPECS)
def test_offloaded_after_attach(spec: str, offload: Callable[..., Any], tmp_path: Path) -> None:
    model = adapted(spec)
    rw.save(model, tmp_path / "adapter")
    expected = logits(model)
    offload(model, tmp_path)
    with pytest.raises(AttachError, match=r"_proj\.adapters\.default\..*found one on the meta device"):
        logits(model)
    for call in (
        rw.merge,
        lambda model: rw.save(model, tmp_path / "again"),
        lambda model: rw.gradients(model, [BATCH]),
    ):
        with pytest.raises(AttachError, match="expected a tensor in memory"):
            call(model)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)


@OFFLOAD
def test_detached_after_offloading_it_is_the_pretrained_model(offload: Callable[..., Any], tmp_path: Path) -> None:
    model = offload(adapted(), tmp_path)
    assert torch.equal(logits(rw.detach(model)), logits(tiny_llama()))


@OFFLOAD
@pytest.mark.parametrize("spec", ["lora", "dora", "whole"])
def test_merged_first_a_model_can_be_offloaded(spec: str, offload: Callable[..., Any], tmp_path: Path) -> None:
    model = adapted(spec)
    rw.merge(model, keep_base=False)
    expected = logits(model)
    assert torch.equal(logits(offload(model, tmp_path)), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_dispatched_without_offloading(spec: str, tmp_path: Path) -> None:
    """As ``device_map`` does it where all fits: before and after the adapter."""
    model = adapted(spec)
    rw.save(model, tmp_path)
    expected = logits(model)
    assert torch.equal(logits(dispatch_model(model, {"": "cpu"})), expected)
    fresh = dispatch_model(tiny_llama(), {"": "cpu"})
    torch.testing.assert_close(logits(rw.load(fresh, tmp_path)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_on_the_meta_device(spec: str, tmp_path: Path) -> None:
    rw.save(adapted(spec), tmp_path)
    model = deepcopy(tiny_llama()).to("meta")
    assert rw.plan(model, SPECS[spec]).parameters == rw.plan(tiny_llama(), SPECS[spec]).parameters
    for call in (lambda: rw.attach(model, SPECS[spec], batches=[BATCH]), lambda: rw.load(model, tmp_path)):
        with pytest.raises(AttachError, match=r"^model\.embed_tokens\.weight: expected a tensor in memory"):
            call()
    assert not any("rankwise" in key for key in model.state_dict())


def test_a_model_of_which_a_part_is_on_disk(tmp_path: Path) -> None:
    rw.save(adapted(), tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places | {"model.rotary_emb": "cpu"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(AttachError, match=r"^model\.layers\.0\.self_attn\.q_proj\.weight: expected a tensor in memory"):
        rw.load(model, tmp_path / "adapter")
