"""Evidence, starts and training on quantised bases: those of the same model with its weights dequantised."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.layers.kinds import base_matrix

IDS = torch.randint(32, (3, 2, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids} for ids in IDS]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def sites(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def replaced(model: nn.Module, build: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name in sites(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, build(model.get_submodule(name)))
    return model


def four_bit(layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
    new.compute_dtype = torch.float32
    new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return new.to("cpu")


def eight_bit(layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return new.to("cpu")


def nf4() -> nn.Module:
    return replaced(llama(), four_bit)


def int8() -> nn.Module:
    return replaced(llama(), eight_bit)


def torchao_int8() -> nn.Module:
    model = llama()
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name in sites(model))
    return model


def bf16() -> nn.Module:
    return llama().bfloat16()


def mixed() -> nn.Module:
    model = nf4()
    model.model.layers[1] = bf16().model.layers[1].float().half().float()  # one block that is not quantised
    return model


# How far an output may lie from that of the dequantised weights: int8 kernels round the activations too.
ROOM = {nf4: 1e-4, int8: 0.15, torchao_int8: 1e-4, bf16: 0.05, mixed: 1e-4}


@pytest.fixture(params=ROOM, ids=lambda build: build.__name__)
def build(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return request.param


def dequantised(model: nn.Module) -> nn.Module:
    """A plain fp32 model with the weights that the base stands for."""
    plain = llama()
    state = plain.state_dict()
    for name, module in model.named_modules():
        if f"{name}.weight" in state:
            state[f"{name}.weight"] = base_matrix(module) if isinstance(module, nn.Linear) else module.weight.float()
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize(("method", "options"), [("exact", {}), ("sketch", {"rank": 4, "passes": 2})])
def test_gradients_are_those_of_the_dequantised_weights(
    build: Callable[[], nn.Module], method: str, options: dict[str, int]
) -> None:
    base = build()
    found = rw.gradients(base, BATCHES, sites(base), method, **options)
    expected = rw.gradients(dequantised(base), BATCHES, sites(llama()))
    for name, truth in expected.items():
        G = truth.matrix
        u, _, v = found[name].svd(4)
        best = torch.linalg.svdvals(G)[:4].square().sum()
        kept = (u.float().T @ G @ v.float()).square().sum()
        assert float(kept / best) > (0.99 if ROOM[build] < 0.01 else 0.9), name


def test_a_lora_ga_start_trains_and_loads_on_the_dequantised_base(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    base = build()
    before = {name: base_matrix(base.get_submodule(name)).clone() for name in sites(base)}
    plain = dequantised(base)
    spec = rw.LoRA(rank=4, init="lora-ga", target_modules=sites(base))
    rw.attach(base, spec, batches=BATCHES)
    ids = IDS[0]
    with torch.no_grad(), rw.disabled(base):
        pretrained = base(ids).logits
    with torch.no_grad():
        assert torch.equal(base(ids).logits, pretrained)
    optimizer = torch.optim.AdamW(rw.trainable_parameters(base), lr=3e-3)
    losses = []
    for _ in range(12):
        losses.append(base(**BATCHES[0]).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.9 * losses[0].item()
    rw.save(base, tmp_path)
    with torch.no_grad():
        trained = base(ids).logits.float()
        rw.load(plain, tmp_path)
        gap = (plain(ids).logits - trained).norm() / (trained - pretrained.float()).norm()
    assert float(gap) < ROOM[build]
    rw.detach(base)
    for name, matrix in before.items():
        assert torch.equal(base_matrix(base.get_submodule(name)), matrix), name


def test_evaluation_before_training_does_not_cut_gradients_off() -> None:
    """What bitsandbytes makes of 4-bit weights in evaluation mode on some CPUs; a plain forward on others."""
    base = nf4()
    rw.attach(base, rw.LoRA(rank=2, target_modules=sites(base)))
    with torch.no_grad():
        base.eval()(IDS[0])
    base.train()(**BATCHES[0]).loss.backward()
    assert all(float(pair.parameters[1].grad.norm()) > 0 for pair in rw.pairs(base))


def test_a_base_that_was_rewritten_for_inference_is_refused_for_training(tmp_path: Path) -> None:
    base = nf4()
    if not base.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes does not rewrite weights on this CPU")
    plain, adapted = dequantised(base), rw.attach(nf4(), rw.LoRA(rank=2, target_modules=sites(base)))
    rw.save(adapted, tmp_path)
    with torch.no_grad():
        base.eval()(IDS[0])
    for refused in (
        lambda: rw.attach(base, rw.LoRA(rank=2, target_modules=sites(base))),
        lambda: rw.gradients(base, BATCHES, sites(base)),
        lambda: rw.load(base, tmp_path, trainable=True),
    ):
        with pytest.raises(rw.errors.AttachError, match="rewritten this 4-bit weight for inference"):
            refused()
    for name in sites(base):
        torch.testing.assert_close(
            base_matrix(base.get_submodule(name)).float(),
            plain.get_submodule(name).weight.detach(),
            rtol=2e-2,
            atol=1e-4,
        )
    rw.load(base, tmp_path)


def test_an_adapter_from_a_4_bit_base_is_known_to_fit_the_full_precision_one(tmp_path: Path) -> None:
    base = nf4()
    rw.save(rw.attach(base, rw.LoRA(rank=2, target_modules=sites(base))), tmp_path)
    rw.load(llama(), tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.normal_()
    with pytest.raises(rw.errors.BaseMismatch, match=r"expected ≤ 50%"):
        rw.load(other, tmp_path)


def test_merging_into_a_quantised_weight_is_refused(build: Callable[[], nn.Module]) -> None:
    base = build()
    model = rw.attach(base, rw.LoRA(rank=2, target_modules=sites(base)))
    if build is bf16:
        rw.merge(model)
        return
    with pytest.raises(rw.errors.MergeError, match="its weight is quantised"):
        rw.merge(model)
