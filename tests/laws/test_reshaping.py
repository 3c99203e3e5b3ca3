"""Pairs that start anew on top of what they learnt, or are cut down: every init, kind of layer and variant that may."""

import functools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from zoo import LAYERS, TOLERANCE, Zoo, base_bytes, clone, fingerprint, perturb, relative, zoo_and_inputs

import rankwise as rw
from rankwise.errors import SpecError
from rankwise.format.save_load import portable
from rankwise.format.state import STATE, load_state, save_state
from rankwise.inits import INITS
from rankwise.reshaping import check_narrowable, check_restartable, narrow, restart, shape_like
from rankwise.squeezing import squeeze
from rankwise.tensor_files import read_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
]
VARIANTS = ("lora", "dora")
# Not those options of the base layer that PEFT's own forward forgets.
COMMON = [name for name in LAYERS if name not in ("conv2d_dilated", "conv2d_reflect", "conv2d_circular")]


def may_restart(init: str) -> bool:
    try:
        check_restartable(rw.LoRA(init=init))
    except SpecError:
        return False
    return True


RESTARTABLE = [init for init in INITS if may_restart(init)]


@functools.cache
def served(init: str, variant: str) -> list[str]:
    """The kinds of layer that the init can start."""
    zoo, _ = zoo_and_inputs()
    names = []
    for name in COMMON:
        try:
            rw.attach(clone(zoo), spec(init, variant, [name]), batches=[zoo_and_inputs(names=[name])[1]])
        except (SpecError, rw.errors.EvidenceError):
            continue
        names.append(name)
    return names


def spec(init: str, variant: str, names: list[str]) -> rw.LoRA:
    return rw.LoRA(rank=2, alpha=3, init=init, variant=variant, scaling="rslora", target_modules=names)


def trained(init: str, variant: str) -> tuple[Zoo, dict[str, Tensor], str]:
    """A zoo with a trained adapter, a batch, and the pretrained zoo's fingerprint."""
    zoo, inputs = zoo_and_inputs(names=served(init, variant))
    before = fingerprint(zoo)
    rw.attach(zoo, spec(init, variant, served(init, variant)), batches=[inputs])
    perturb(zoo, 0.2)
    return zoo, inputs, before


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.eval()(**inputs).outputs


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, y in expected.items():
        assert relative(found[name], y) <= 4 * TOLERANCE[torch.float32], name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", RESTARTABLE)
def test_restarts_keep_the_function_the_base_and_the_file(init: str, variant: str, tmp_path: Path):
    model, inputs, pretrained = trained(init, variant)
    base, parameters = base_bytes(model), rw.trainable_parameters(model)
    shapes = [parameter.shape for parameter in parameters]
    for seed in (1, 2):
        learnt = outputs(model, inputs)
        before = [pair.A.clone() for pair in rw.pairs(model)]
        restart(model, [inputs], seed=seed)
        close(outputs(model, inputs), learnt)
        assert all(pair.A.shape == A.shape for pair, A in zip(rw.pairs(model), before, strict=True))
        now = rw.trainable_parameters(model)  # the same, that an optimizer steps
        assert [*map(id, now)] == [*map(id, parameters)] and [parameter.shape for parameter in now] == shapes
        perturb(model, 0.2, seed)
        gaps = {name: relative(y, learnt[name]) for name, y in outputs(model, inputs).items()}
        assert min(gaps.values()) > 1e-3, gaps  # it is trained on
    assert base_bytes(model) == base
    adapted = outputs(model, inputs)
    rw.save(model, tmp_path)
    rw.detach(model)
    assert fingerprint(model.train()) == pretrained
    close(outputs(rw.load(clone(model), tmp_path), inputs), adapted)
    peft = PeftModel.from_pretrained(model, tmp_path, config=LoraConfig.from_pretrained(tmp_path))
    close(outputs(peft, inputs), adapted)


def test_a_new_start_sees_the_gradient_of_the_model_as_it_is():
    """LoRA-GA's A₀ spans the leading right singular vectors of the present gradient, not of the pretrained model's."""
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(12, 10)), torch.randn(20, 12)
    target = torch.randn(20, 10)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - target).square().mean()

    rw.attach(model, rw.LoRA(rank=2, init="lora-ga"), batches=[X], loss=loss)
    perturb(model, 1.0)
    W = (model[0].weight + rw.pairs(model)[0].layer.delta().dense()).detach().requires_grad_()
    (G,) = torch.autograd.grad((nn.functional.linear(X, W, model[0].bias) - target).square().mean(), W)
    restart(model, [X], loss, seed=1)
    V = torch.linalg.svd(G).Vh[:2]
    A = torch.linalg.qr(rw.pairs(model)[0].A.detach().T).Q
    assert float((V @ A).norm() ** 2) == pytest.approx(2.0, abs=1e-4)


def test_a_new_random_start_has_directions_of_its_own():
    model, _, _ = trained("kaiming", "lora")
    starts = [rw.pairs(model)[0].A.clone()]
    for seed in (1, 2):
        restart(model, seed=seed)
        starts.append(rw.pairs(model)[0].A.clone())
        assert not rw.pairs(model)[0].B.any()
    again, _, _ = trained("kaiming", "lora")
    restart(again, seed=1)
    assert torch.equal(rw.pairs(again)[0].A, starts[1])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_can_be_cut(variant: str):
    model, inputs, _ = trained("lora-ga", variant)
    changes = {pair.name: pair.layer.delta().dense() for pair in rw.pairs(model)}
    restart(model, [inputs], seed=1, kept_rank=2)
    for pair in rw.pairs(model):
        layer = pair.layer
        assert layer.earlier.A.shape[0] <= 2
        U, S, Vh = torch.linalg.svd(changes[pair.name].double(), full_matrices=False)
        assert relative(layer.delta().dense(), (U[:, :2] * S[:2]) @ Vh[:2]) < 1e-5


def test_narrow_goes_on_from_the_squeezed_pair():
    model, inputs, pretrained = trained("lora-ga", "lora")
    restart(model, [inputs], seed=1)
    perturb(model, 0.2, 3)
    expected = squeeze(portable(model), rank=1)
    assert narrow(model, 1).errors == expected.errors
    for pair in rw.pairs(model):
        site = expected.adapter.sites[pair.name]
        assert relative(pair.layer.delta().dense(), site.delta.dense()) < 1e-6
        assert [parameter.shape[0] for parameter in pair.parameters] == [1, site.delta.shape[0]]
        assert pair.layer.site.rank == 1
    model(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in rw.trainable_parameters(model))
    rw.detach(model)
    model.zero_grad()
    assert fingerprint(model) == pretrained


def test_a_saved_state_is_read_into_a_model_at_its_first_start(tmp_path: Path):
    model, inputs, _ = trained("lora-ga", "lora")
    states = {"restarted": lambda: restart(model, [inputs], seed=1), "narrow": lambda: narrow(model, 1)}
    for name, reshape in states.items():
        reshape()
        perturb(model, 0.1)
        save_state(model, tmp_path / name)
        other, _, _ = trained("lora-ga", "lora")
        shape_like(other, read_tensors(tmp_path / name / STATE))
        load_state(other, tmp_path / name)
        found, expected = other.state_dict(), model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": "adalora"}, "restart: expected the variant lora or dora with anchor='frozen', found adalora"),
        ({"anchor": "fold"}, "found lora with anchor='fold'"),
        ({"init": "eva"}, "init Eva changes the model's function or its ranks"),
        ({"init": "loftq"}, "init Loftq changes the model's function or its ranks"),
    ],
)
def test_what_cannot_restart_is_refused(changes: dict[str, str], said: str):
    with pytest.raises(SpecError, match=said):
        check_restartable(rw.LoRA(**changes))


def test_what_cannot_be_narrowed_is_refused():
    with pytest.raises(SpecError, match="expected a rank below the 8 that is trained, found 8"):
        check_narrowable(rw.LoRA(rank=8), 8)
    with pytest.raises(SpecError, match="squeeze: expected the variant lora with anchor='frozen', found dora"):
        check_narrowable(rw.LoRA(rank=8, variant="dora"), 4)
