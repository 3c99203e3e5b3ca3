"""The bottleneck adapter alone, and with LoRA on one model."""

import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import (
    AttachError,
    BaseMismatch,
    BrokenFile,
    MergeError,
    MissingTensor,
    SpecError,
    TargetError,
    UnexpectedTensor,
)
from rankwise.format.state import load_state, save_state


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def make() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(Block(), Block()), torch.randn(5, 8)


SPEC = rw.Bottleneck(["down"], width=3, activation="relu")


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(rw.trainable_parameters(model), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_it_is_houlsbys_formula() -> None:
    model, x = make()
    pretrained = model(x).detach()
    rw.attach(model, SPEC)
    assert torch.equal(model(x), pretrained)
    assert sum(p.numel() for p in rw.trainable_parameters(model)) == 2 * (3 * 8 + 3 + 8 * 3 + 8)
    train(model, x)
    adapted = model(x)
    assert not torch.allclose(adapted, pretrained)
    for block in model:
        adapter = block.down.rankwise.adapters["default"]
        y = F.linear(torch.tanh(block.up(x)), block.down.weight, block.down.bias)
        h = torch.relu(y @ adapter.down.weight.T + adapter.down.bias)
        x = x + y + h @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(x, adapted)


def test_it_comes_off_without_a_trace() -> None:
    model, x = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pretrained = model(x).detach()
    rw.attach(model, SPEC)
    train(model, x)
    with rw.disabled(model):
        assert torch.equal(model(x), pretrained)
    rw.detach(model)
    assert torch.equal(model(x), pretrained)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_it_acts_on_what_lora_made_of_the_layer(variant: str) -> None:
    model, x = make()
    rw.attach(model, rw.LoRA(rank=2, init="pissa", variant=variant, target_modules=["up", "down"]), name="lora")
    rw.attach(model, SPEC, name="houlsby")
    rw.activate(model, ("houlsby", "lora"))
    assert len(rw.trainable_parameters(model)) == 2 * 4 + 4 * (2 if variant == "lora" else 3)
    train(model, x)
    both = model(x)
    rw.activate(model, ("lora", "houlsby"))
    assert torch.equal(model(x), both)
    merged = deepcopy(model)
    rw.activate(merged, "lora")
    folded, bottlenecks = nn.Sequential(Block(), Block()), []
    rw.merge(merged)  # the weight with LoRA in it is what the bottleneck must see
    folded.load_state_dict({k: v for k, v in merged.state_dict().items() if "rankwise" not in k})
    for block in model:
        bottlenecks.append(block.down.rankwise.adapters["houlsby"])
    for block, bottleneck in zip(folded, bottlenecks, strict=True):
        block.down.register_forward_hook(lambda m, a, y, b=bottleneck: b.adapt(m, a[0], y.clone()))
    torch.testing.assert_close(folded(x), both)
    with pytest.raises(MergeError, match="'houlsby' is a BottleneckLayer, which is not linear"):
        rw.merge(model)
    assert torch.equal(model(x), both)


def test_both_are_saved_and_loaded_by_name(tmp_path: Path) -> None:
    model, x = make()
    rw.attach(model, rw.LoRA(rank=2, target_modules=["up"]), name="lora")
    rw.attach(model, SPEC, name="houlsby")
    rw.activate(model, ("lora", "houlsby"))
    train(model, x)
    with pytest.raises(AttachError, match="name one adapter"):
        rw.save(model, tmp_path)
    for name in ("lora", "houlsby"):
        rw.save(model, tmp_path / name, name=name)
    both = model(x)
    fresh = rw.detach(deepcopy(model))
    for name in ("lora", "houlsby"):
        rw.load(fresh, tmp_path / name, name=name, trainable=name == "houlsby")
    rw.activate(fresh, ("lora", "houlsby"))
    torch.testing.assert_close(fresh(x), both)
    assert len(rw.trainable_parameters(fresh)) == 8
    rw.detach(fresh, "lora")
    rw.activate(fresh, "houlsby")
    with rw.disabled(model):
        assert not torch.allclose(fresh(x), model(x))


def test_peft_refuses_the_directory_by_name(tmp_path: Path) -> None:
    model, _ = make()
    rw.save(rw.attach(model, SPEC), tmp_path)
    with pytest.raises(KeyError, match="RANKWISE_BOTTLENECK"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_the_exact_state_resumes(tmp_path: Path) -> None:
    model, x = make()
    fresh = deepcopy(model)
    rw.attach(model, SPEC)
    train(model, x)
    save_state(model, tmp_path)
    load_state(rw.attach(fresh, SPEC), tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_the_start_depends_on_the_seed_and_the_site_only() -> None:
    def weights(names: list[str], seed: int) -> dict[str, Tensor]:
        model, _ = make()
        rw.attach(model, rw.Bottleneck(names, width=3, seed=seed))
        return {k: v for k, v in model.state_dict().items() if k.endswith("down.weight") and "rankwise" in k}

    assert torch.equal(
        weights(["down"], 1)["1.down.rankwise.adapters.default.down.weight"],
        weights(["1.down"], 1)["1.down.rankwise.adapters.default.down.weight"],
    )
    assert not torch.equal(*[weights(["0.down"], s)["0.down.rankwise.adapters.default.down.weight"] for s in (1, 2)])


def test_a_damaged_or_foreign_directory_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = make()
    rw.save(rw.attach(model, SPEC), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    rw.detach(model)
    save_file({k: v for k, v in whole.items() if k != "0.down.up.bias"}, file)
    with pytest.raises(MissingTensor, match=r"lacks 0\.down\.up\.bias"):
        rw.load(model, tmp_path)
    save_file({**whole, "0.down.other": torch.ones(2)}, file)
    with pytest.raises(UnexpectedTensor, match="other"):
        rw.load(model, tmp_path)
    save_file(whole, file)
    with pytest.raises(BaseMismatch, match="lacks"):
        rw.load(nn.Sequential(Block()), tmp_path)
    other, _ = make()
    with pytest.raises(BaseMismatch, match="differ by"):
        rw.load(other, tmp_path)
    rw.load(other, tmp_path, allow_other_base=True)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "RANKWISE_BOTTLENECK"}')
    with pytest.raises(BrokenFile, match="spec"):
        rw.load(model, tmp_path)


def test_bad_specs_are_refused() -> None:
    with pytest.raises(SpecError, match="width"):
        rw.Bottleneck(["down"], width=0)
    with pytest.raises(SpecError, match="activation"):
        rw.Bottleneck(["down"], activation="geluu")
    with pytest.raises(TargetError, match="last axis"):
        rw.attach(nn.Sequential(nn.Conv2d(3, 4, 3)), rw.Bottleneck(["0"]))
    assert rw.LoRA.from_dict(SPEC.to_dict()) == SPEC
    with pytest.raises(SpecError, match="start of its own"):
        rw.LoRA(variant="bottleneck", init="pissa")
