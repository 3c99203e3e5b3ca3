"""modules_to_save: a copy trained whole, which gives the module its own tensors back."""

import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import AttachError, BaseMismatch, MissingTensor, ShapeMismatch, TargetError, UnexpectedTensor
from rankwise.format.state import load_state, save_state


class Classifier(nn.Module):
    """An encoder with a head of several modules; running statistics are part of it."""

    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, labels))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


SPEC = rw.LoRA(rank=2, init="pissa", target_modules=["0", "2"], modules_to_save=("classifier",))


def make() -> tuple[Classifier, Tensor]:
    return Classifier(), torch.randn(16, 6)


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(rw.trainable_parameters(model), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_the_copy_is_trained_and_the_original_comes_back() -> None:
    model, x = make()
    before, own = snapshot(model), list(model.parameters())
    pretrained = model.eval()(x).detach()
    assert [pair.name for pair in rw.pairs(rw.attach(model, SPEC))] == ["body.0", "body.2"]
    assert torch.equal(model(x), pretrained)
    trained = rw.trainable_parameters(model)
    assert len(trained) == 4 + 6 and len({id(p) for p in trained}) == 10
    train(model.train(), x)
    head = model.classifier[2].weight
    assert not torch.equal(head, before["classifier.2.weight"]) and head.requires_grad
    assert not torch.equal(model.classifier[1].running_mean, before["classifier.1.running_mean"])
    adapted = model.eval()(x)
    with rw.disabled(model):
        assert torch.equal(model(x), pretrained)
        with rw.disabled(model):
            assert torch.equal(model(x), pretrained)
        assert torch.equal(model(x), pretrained)
    assert torch.equal(model(x), adapted)
    rw.detach(model)
    same(snapshot(model), before)
    assert all(
        found is expected and found.requires_grad for found, expected in zip(model.parameters(), own, strict=True)
    )


def test_it_survives_deepcopy_and_pickle_and_a_change_of_type() -> None:
    model, x = make()
    rw.attach(model, SPEC)
    train(model, x)
    expected = model.eval()(x)
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        train(twin.train(), x)
        assert torch.equal(model(x), expected)
        with rw.disabled(twin), rw.disabled(model):
            assert torch.equal(twin.eval()(x), model(x))
    double = deepcopy(model).double()
    torch.testing.assert_close(double(x.double()), expected.double(), atol=1e-5, rtol=1e-4)
    double.train()(x.double())
    statistics = double.classifier[1].running_mean.clone()
    with rw.disabled(double):
        assert not torch.equal(double.classifier[1].running_mean, statistics)
    assert torch.equal(double.classifier[1].running_mean, statistics)
    assert rw.detach(double).classifier[1].running_mean.dtype == torch.float64


def test_each_adapter_has_its_own_copy() -> None:
    model, x = make()
    rw.attach(model, SPEC, name="a")
    train(model, x)
    a = model.eval()(x)
    rw.attach(model, SPEC, name="b")
    train(model.train(), x, steps=5)
    b = model.eval()(x)
    assert torch.equal(rw.activate(model, "a")(x), a)
    assert len(rw.trainable_parameters(model)) == 10
    assert torch.equal(rw.activate(model, "b")(x), b)
    with pytest.raises(AttachError, match=r"classifier\.0: adapters \['a', 'b'\]"):
        rw.activate(model, ("a", "b"))
    assert torch.equal(model(x), b)
    rw.detach(model, "a")
    assert torch.equal(model(x), b)


def test_merge_keeps_what_was_trained() -> None:
    model, x = make()
    before = snapshot(model)
    rw.attach(model, SPEC)
    train(model, x)
    adapted = model.eval()(x)
    plain = deepcopy(model)
    rw.merge(plain, keep_base=False)
    torch.testing.assert_close(plain(x), adapted)
    assert plain.state_dict().keys() == before.keys()
    rw.merge(model)
    torch.testing.assert_close(model(x), adapted)
    rw.unmerge(model)
    assert torch.equal(model(x), adapted)
    rw.merge(model)
    same(snapshot(rw.detach(model)), before)


def test_save_and_load(tmp_path: Path) -> None:
    model, x = make()
    fresh = deepcopy(model)
    rw.attach(model, SPEC)
    train(model, x)
    rw.save(model, tmp_path)
    adapted = model.eval()(x)
    rw.load(fresh, tmp_path)
    torch.testing.assert_close(fresh.eval()(x), adapted)
    assert not rw.trainable_parameters(fresh)
    rw.load(rw.detach(fresh), tmp_path, trainable=True)
    assert len(rw.trainable_parameters(fresh)) == 10


def test_the_exact_state_resumes(tmp_path: Path) -> None:
    model, x = make()
    fresh = deepcopy(model)
    rw.attach(model, SPEC)
    train(model, x)
    save_state(model, tmp_path)
    load_state(rw.attach(fresh, SPEC), tmp_path)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_peft_reads_what_we_write(tmp_path: Path) -> None:
    model, x = make()
    base = deepcopy(model)
    rw.attach(model, SPEC)
    train(model, x)
    rw.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(theirs.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-4)


def test_we_read_what_peft_writes(tmp_path: Path) -> None:
    model, x = make()
    base = deepcopy(model)
    # PEFT lists the heads that a model for sequence classification may have, "score" among them.
    config = LoraConfig(r=2, target_modules=["body.0", "body.2"], modules_to_save=["classifier", "score"])
    theirs = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    rw.load(base, tmp_path / "theirs")
    torch.testing.assert_close(base.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-4)
    rw.save(base, tmp_path / "ours")
    ours, first = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    same(ours, first)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, _ = make()
    with pytest.raises(TargetError, match="modules_to_save: 'clasifier' match no module"):
        rw.plan(model, rw.LoRA(target_modules=["0"], rank=2, modules_to_save="clasifier"))
    before = snapshot(model)
    rw.save(rw.attach(model, SPEC), tmp_path)
    rw.detach(model)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    key = "base_model.model.classifier.2.weight"
    for change, error in (
        ({key: None}, MissingTensor),
        ({"base_model.model.classifier.2.other": torch.ones(1)}, UnexpectedTensor),
        ({key: torch.ones(4, 8)}, ShapeMismatch),
        ({"base_model.model.other.classifier.weight": torch.ones(1)}, BaseMismatch),
    ):
        save_file({k: v for k, v in {**whole, **change}.items() if v is not None}, file)
        with pytest.raises(error, match=r"classifier"):
            rw.load(model, tmp_path)
        same(snapshot(model), before)
    rw.attach(model, rw.LoRA(rank=2, target_modules=["classifier.0"]))
    with pytest.raises(AttachError, match="an adapter sits inside"):
        rw.attach(model, SPEC, name="second")
