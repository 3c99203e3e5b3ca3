"""torch.compile and torch.jit.trace: the same values and gradients as without, in one graph.

In a process of its own: the shape checker that the tests install on rankwise is Python that the compiler cannot read.
"""

import copy
import subprocess
import sys
import tempfile
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.variants import VARIANTS


def _model(init: str, variant: str, dropout: float) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    rw.attach(model, rw.LoRA(rank=2, init=init, variant=variant, dropout=dropout))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, x


def _grads(model: nn.Module, run: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(x).square().mean().backward()
    return [p.grad.clone() for p in rw.trainable_parameters(model) if p.grad is not None]


def same_as_without(init: str, variant: str) -> None:
    model, x = _model(init, variant, 0.0)
    plain = copy.deepcopy(model)
    expected, gradients = plain(x), _grads(plain, plain, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    for found, gradient in zip(_grads(model, compiled, x), gradients, strict=True):
        assert gradient.any()
        torch.testing.assert_close(found, gradient)
    with torch.no_grad(), rw.disabled(model):
        pretrained = compiled(x)
        torch.testing.assert_close(pretrained, model(x))
        assert not torch.allclose(pretrained, expected)
    optimizer = torch.optim.SGD(rw.trainable_parameters(model), lr=0.5)
    optimizer.step()  # parameters that change are followed
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), expected)


def dropout_still_drops() -> None:
    model, x = _model("pissa", "lora", 0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))


def a_compiled_wrapper_is_seen_through() -> None:
    model, x = _model("pissa", "lora", 0.0)
    compiled = torch.compile(model, backend="aot_eager")
    assert [p.name for p in rw.pairs(compiled)] == ["0", "2"]
    rw.attach(compiled, rw.LoRA(rank=2), name="second")  # through the wrapper: onto the model's own modules
    assert [p.name for p in rw.pairs(model, "second")] == ["0", "2"]
    rw.activate(compiled, ["default", "second"])
    torch.testing.assert_close(compiled(x), model(x))
    rw.detach(compiled)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def adapters_that_come_and_go_later_are_followed() -> None:
    """On a model that has been compiled, and has run, before."""
    adapter, x = _model("pissa", "lora", 0.0)
    pretrained = copy.deepcopy(adapter)
    rw.detach(pretrained)
    expected, plain = adapter(x), pretrained(x)
    assert not torch.allclose(expected, plain)
    model = copy.deepcopy(pretrained).requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain)
    with tempfile.TemporaryDirectory() as directory:
        rw.save(adapter, directory)
        rw.load(model, directory, trainable=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in rw.trainable_parameters(model))
    for step, value in ((rw.merge, expected), (rw.unmerge, expected), (rw.detach, plain)):
        step(model)
        torch.testing.assert_close(compiled(x), value)


def the_wrapper_itself_may_be_handed_over() -> None:
    adapter, x = _model("kaiming", "lora", 0.0)
    model = copy.deepcopy(adapter)
    rw.detach(model)
    plain = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    rw.attach(compiled, rw.LoRA(rank=2))
    assert [p.name for p in rw.pairs(compiled)] == ["0", "2"]
    with tempfile.TemporaryDirectory() as directory:
        rw.save(compiled, directory)
    rw.merge(compiled)
    rw.detach(compiled)
    torch.testing.assert_close(compiled(x), plain)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def blocks_compiled_alone(fullgraph: bool) -> None:
    """Each with code of its own: what runs inside calls the products past every layer."""
    model, x = _model("kaiming", "lora", 0.0)
    expected, gradients = model(x), _grads(model, model, x)
    fresh = copy.deepcopy(model)
    rw.detach(fresh)
    fresh[0].compile(backend="aot_eager", fullgraph=fullgraph)
    with tempfile.TemporaryDirectory() as directory:
        rw.save(model, directory)
        rw.load(fresh, directory, trainable=True)
    for _ in range(3):
        torch.testing.assert_close(fresh(x), expected)
        for found, gradient in zip(_grads(fresh, fresh, x), gradients, strict=True):
            torch.testing.assert_close(found, gradient)
    assert not fresh._forward_hooks  # all layers have run


def traced(variant: str, with_gradient: bool) -> None:
    """By torch.jit: on other batches than the one it was traced with, and from a file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    rw.attach(model, rw.LoRA(rank=2, variant=variant, target_modules=["0", "2"], dropout=0.5))
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, other = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 7, 8, dtype=torch.float64)
    with torch.set_grad_enabled(with_gradient):
        function = torch.jit.trace(model.eval(), x)
    with tempfile.NamedTemporaryFile() as file:
        function.save(file.name)
        for either in (function, torch.jit.load(file.name)):
            torch.testing.assert_close(either(other), model(other))
    dropping = torch.jit.trace(model.train(), x, check_trace=False)
    assert not torch.equal(dropping(x), dropping(x))


def rows_of_several_adapters() -> None:
    """Compiled in a block and outside of one, with other rows later."""
    model, x = _model("pissa", "lora", 0.0)
    rw.attach(model, rw.LoRA(rank=3, variant="dora"), name="stretched")
    with torch.no_grad():
        for parameter in rw.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (["default", None, "stretched"], None, ["stretched", "stretched", "default"], ["default"] * 3):
        with rw.route(model, rows) if rows else nullcontext():
            torch.testing.assert_close(compiled(x), model(x))
            gradients = _grads(model, compiled, x)
            for found, gradient in zip(gradients, _grads(model, model, x), strict=True):
                torch.testing.assert_close(found, gradient)


CASES = {
    **{
        f"traced {variant} {with_gradient}": (traced, variant, with_gradient)
        for variant in VARIANTS
        for with_gradient in (True, False)
    },
    **{
        f"{init}-{variant}": (same_as_without, init, variant)
        for init in ("kaiming", "pissa")
        for variant, method in VARIANTS.items()
        if method.cls.takes_start
    },
    "blocks": (blocks_compiled_alone, False),
    "blocks in one graph": (blocks_compiled_alone, True),
    "dropout": (dropout_still_drops,),
    "rows": (rows_of_several_adapters,),
    "later": (adapters_that_come_and_go_later_are_followed,),
    "bare wrapper": (the_wrapper_itself_may_be_handed_over,),
    "wrapper": (a_compiled_wrapper_is_seen_through,),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Case → "ok" or its error: one process for all."""
    run = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return dict(line.split("\t", 1) for line in run.stdout.splitlines() if "\t" in line)


@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str, outcomes: dict[str, str]):
    assert outcomes[case] == "ok"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (check, *arguments) in CASES.items():
        try:
            check(*arguments)
        except Exception as error:  # noqa: BLE001
            print(name, repr(f"{type(error).__name__}: {error}"), sep="\t")
        else:
            print(name, "ok", sep="\t")
        torch._dynamo.reset()
