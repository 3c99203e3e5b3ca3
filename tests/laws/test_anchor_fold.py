"""anchor="fold": the start is subtracted from the base weights; r columns a forward, not 2r, at rounding's cost."""

import logging

import pytest
import torch
from torch import Tensor, nn
from zoo import (
    DTYPES,
    LAYERS,
    TOLERANCE,
    base_bytes,
    clone,
    fingerprint,
    left_as_it_was,
    perturb,
    relative,
    zoo_and_inputs,
)

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import AttachError, SpecError
from rankwise.inits import INITS

NAMES = ["linear", "conv1d", "conv2d", "conv2d_grouped", "embedding"]


def served(init: str) -> list[str]:
    zoo, _ = zoo_and_inputs()
    names = []
    for name in NAMES:
        try:
            rw.plan(zoo, rw.LoRA(rank=2, init=init, target_modules=[name]))
        except SpecError:
            continue
        names.append(name)
    assert {"linear", "conv1d"} <= set(names)
    return names


def attached(init: str, anchor: str, dtype: torch.dtype):
    names = served(init)
    zoo, inputs = zoo_and_inputs(dtype, names)
    pretrained = clone(zoo)
    original, _ = zoo_and_inputs(torch.float64, names)
    perturb(original, 0.01)
    needed = {"evidence": rw.weights(original, names)} if INITS[init].cls.needs == "weights" else {"batches": [inputs]}
    rw.attach(zoo, rw.LoRA(rank=2, init=init, target_modules=names, anchor=anchor), **needed)
    return zoo, pretrained, inputs


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(**inputs).outputs


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("init", INITS)
def test_the_same_adapter_as_with_a_frozen_anchor(init: str, dtype: torch.dtype, tmp_path):
    """Same start, same function after the same training, same file; and every bit of the base comes back."""
    folded, pretrained, inputs = attached(init, "fold", dtype)
    frozen, _, _ = attached(init, "frozen", dtype)
    # In bf16 the fold rounds the weight itself: an error relative to the products that it subtracts.
    tolerance = 10 * TOLERANCE[dtype]
    for a, b in ((folded, frozen), (folded, pretrained) if INITS[init].cls.keeps_function else (folded, frozen)):
        expected = outputs(b, inputs)
        for name, y in outputs(a, inputs).items():
            assert relative(y, expected[name]) < tolerance, name
    perturb(folded, 0.2)
    perturb(frozen, 0.2)
    expected, base = outputs(frozen, inputs), outputs(pretrained, inputs)
    for name, y in outputs(folded, inputs).items():
        assert relative(y, expected[name]) < tolerance, name
    rw.save(folded, tmp_path / "folded")
    rw.save(frozen, tmp_path / "frozen")
    again, reference = (rw.load(clone(pretrained), tmp_path / d) for d in ("folded", "frozen"))
    for name, y in outputs(again, inputs).items():  # the file is exact on the clean base
        assert torch.equal(y, outputs(reference, inputs)[name]), name
    with rw.disabled(folded):
        assert all(torch.equal(y, base[name]) for name, y in outputs(folded, inputs).items())
    assert relative(outputs(folded, inputs)["linear"], expected["linear"]) < tolerance
    rw.merge(folded)
    for name, y in outputs(folded, inputs).items():
        assert relative(y, expected[name]) < 3 * TOLERANCE[dtype], name  # from W₀ itself, so no better base is lost
    rw.unmerge(folded)
    rw.merge(folded)
    rw.detach(folded)
    assert fingerprint(folded) == fingerprint(pretrained)
    folded, *_ = attached(init, "fold", dtype)
    rw.detach(folded)
    assert base_bytes(folded) == base_bytes(pretrained)


def test_it_runs_r_columns_instead_of_2r():
    zoo, _, inputs = attached("pissa", "fold", torch.float32)
    shapes: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        zoo.linear(inputs["linear"]).sum()
    assert (15, 2) in shapes and (15, 4) not in shapes
    assert Adapted.of(zoo).adapter_layers("default")["linear"].running().rank == 2


def test_it_says_what_rounding_cost(caplog):
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        with caplog.at_level(logging.WARNING, logger="rankwise"):
            attached("pissa", "fold", dtype)
        message = caplog.records[-1].getMessage()
        assert "rounding W₀ − sB₀A₀ moved the start by up to" in message
        errors[dtype] = float(message.rpartition("up to ")[2].split()[0])
    assert errors[torch.float32] < 1e-6 < 1e-4 < errors[torch.bfloat16] < 1e-2


def test_it_must_be_the_only_adapter(tmp_path):
    zoo, pretrained, _ = attached("pissa", "fold", torch.float32)
    with (
        left_as_it_was(zoo),
        pytest.raises(AttachError, match=r"carries an adapter with anchor='fold'.*only one; detach"),
    ):
        rw.attach(zoo, rw.LoRA(rank=2, target_modules=["linear"]), name="second")
    rw.save(zoo, tmp_path)
    with left_as_it_was(zoo), pytest.raises(AttachError, match=r"carries an adapter with anchor='fold'"):
        rw.load(zoo, tmp_path, name="second")
    rw.attach(pretrained, rw.LoRA(rank=2, target_modules=["linear"]))
    with (
        left_as_it_was(pretrained),
        pytest.raises(AttachError, match=r"anchor='fold' changes the base weights.*only adapter"),
    ):
        rw.attach(pretrained, rw.LoRA(rank=2, init="pissa", anchor="fold", target_modules=["linear"]), name="second")


def test_a_tied_weight_is_refused_and_a_shared_layer_is_not():
    embed, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = embed.weight
    tied = nn.Sequential(embed, head)
    spec = rw.LoRA(rank=2, init="pissa", anchor="fold", target_modules=["0"])
    with left_as_it_was(tied), pytest.raises(AttachError, match=r"^0: its weight is shared by .*'frozen'"):
        rw.attach(tied, spec)
    layer = nn.Linear(6, 6)
    shared, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 6)
    pretrained = shared(x).detach()
    rw.attach(shared, spec)
    torch.testing.assert_close(shared(x), pretrained)


def test_every_listed_layer_is_in_the_zoo():
    assert set(NAMES) <= set(LAYERS)
