"""LoftQ on bitsandbytes' NF4, on the CPU: the start is nearer to the full-precision model than the base is."""

from copy import deepcopy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import EvidenceError
from rankwise.layers.kinds import base_matrix


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def quantised(model: Chain) -> Chain:
    twin = deepcopy(model)
    for name in ("first", "second"):
        layer = getattr(twin, name)
        four = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32)
        four.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        four.bias = layer.bias
        setattr(twin, name, four.to("cpu"))
    return twin


def spec(**options: object) -> rw.LoRA:
    return rw.LoRA(rank=8, init="loftq", target_modules=["first", "second"], **options)  # type: ignore[arg-type]


def test_the_start_is_the_best_low_rank_correction() -> None:
    full = Chain()
    base = quantised(full)
    packed = base.first.weight.data.clone()
    rw.attach(base, spec(), evidence=rw.weights(full, ["first", "second"]))
    for pair in rw.pairs(base):
        lost = full.get_submodule(pair.name).weight - base_matrix(base.get_submodule(pair.name))
        U, s, Vh = torch.linalg.svd(lost, full_matrices=False)
        literal = (U[:, :8] @ torch.diag(s[:8].sqrt())) @ (torch.diag(s[:8].sqrt()) @ Vh[:8])
        torch.testing.assert_close(pair.scale * pair.B @ pair.A, literal, atol=1e-5, rtol=1e-3)
    assert torch.equal(base.first.weight.data, packed)


def test_the_start_is_nearer_to_full_precision(tmp_path: Path) -> None:
    full, x = Chain(), torch.randn(50, 64)
    base = quantised(full)
    target, plain = full(x).detach(), base(x).detach()
    rw.attach(base, spec(), evidence=rw.weights(full, ["first", "second"]))
    corrected = base(x).detach()
    assert (corrected - target).norm() < 0.95 * (plain - target).norm()
    with rw.disabled(base):
        assert torch.equal(base(x), plain)
    rw.save(base, tmp_path)
    again = rw.load(quantised(full), tmp_path)
    torch.testing.assert_close(again(x), corrected)
    assert torch.equal(rw.detach(base)(x), plain)


def test_training_goes_on_from_the_correction() -> None:
    full, x = Chain(), torch.randn(50, 64)
    base = rw.attach(quantised(full), spec(), evidence=rw.weights(full, ["first", "second"]))
    optimizer = torch.optim.Adam(rw.trainable_parameters(base), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = (base(x) - full(x).detach()).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("layout", ["file", "directory", "index"])
def test_the_reference_may_lie_on_disk(layout: str, tmp_path: Path) -> None:
    full = Chain()
    if layout == "index":
        save_file({"first.weight": full.first.weight.detach()}, tmp_path / "one.safetensors")
        save_file({"second.weight": full.second.weight.detach()}, tmp_path / "two.safetensors")
        index = '{"weight_map": {"first.weight": "one.safetensors", "second.weight": "two.safetensors"}}'
        (tmp_path / "model.safetensors.index.json").write_text(index)
    else:
        save_file({k: v.detach() for k, v in full.state_dict().items()}, tmp_path / "model.safetensors")
    where = tmp_path / "model.safetensors" if layout == "file" else tmp_path
    on_disk = rw.LoRA.from_dict({**spec().to_dict(), "init": {"name": "loftq", "reference": str(where)}})
    found = rw.attach(quantised(full), on_disk)
    expected = rw.attach(quantised(full), spec(), evidence=rw.weights(full, ["first", "second"]))
    for one, other in zip(rw.pairs(found), rw.pairs(expected), strict=True):
        assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


def test_errors_say_what_to_give(tmp_path: Path) -> None:
    full = Chain()
    base = quantised(full)
    with pytest.raises(EvidenceError, match="reference="):
        rw.attach(base, spec())
    with pytest.raises(EvidenceError, match="equals its reference"):
        rw.attach(deepcopy(full), spec(), evidence=rw.weights(full, ["first", "second"]))
    with pytest.raises(EvidenceError, match=r"cannot read first\.weight"):
        rw.attach(base, rw.LoRA(init=rw.inits.Loftq(str(tmp_path / "no")), target_modules=["first"]))
    save_file({"other.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EvidenceError, match=r"cannot read first\.weight"):
        rw.attach(base, rw.LoRA(init=rw.inits.Loftq(str(tmp_path)), target_modules=["first"]))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(EvidenceError, match=r"lists no first\.weight"):
        rw.attach(base, rw.LoRA(init=rw.inits.Loftq(str(tmp_path)), target_modules=["first"]))
