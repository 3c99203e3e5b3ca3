"""Derivatives of every order and mode, through every variant on every kind of layer: those of the folded weights."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from zoo import PAIR_VARIANTS, perturb, zoo_and_inputs

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.variants.base import AdapterLayer, FoldableLayer

# torch's own forward mode imports it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

# One start with a zero half, one with an anchor; the bottleneck has its own.
CASES = [(variant, init) for variant in PAIR_VARIANTS for init in ("kaiming", "olora")] + [("bottleneck", "kaiming")]
LINEAR, CONVOLUTIONS = ["linear", "linear_without_bias", "conv1d"], ["conv2d_grouped", "conv2d_without_bias"]
Tensors = dict[str, Tensor]


class Case:
    """An adapted zoo, and its loss twice: by the adapters, and by the dense weights that they stand for."""

    def __init__(self, variant: str, init: str, names: list[str]) -> None:
        spec = rw.LoRA(rank=2, target_modules=names, variant=variant, init=init)
        self.model, self.inputs = zoo_and_inputs(torch.float64, names)
        self.bare = deepcopy(self.model)
        rw.attach(self.model.train(), spec)
        perturb(self.model, 0.3)
        self.adapters = Adapted.of(self.model).adapter_layers("default")
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.x = {n: x.requires_grad_() for n, x in self.inputs.items() if x.is_floating_point()}

    def loss(self, parameters: Tensors, x: Tensors) -> Tensor:
        return loss_of(functional_call(self.model, parameters, (), self.inputs | x).outputs)

    def dense_loss(self, parameters: Tensors, x: Tensors) -> Tensor:
        inputs, outputs = self.inputs | x, {}
        for name, adapter in self.adapters.items():
            prefix = f"{name}.rankwise.adapters.default."
            own = {key.removeprefix(prefix): p for key, p in parameters.items() if key.startswith(prefix)}
            outputs[name] = functional_call(Dense(self.bare.get_submodule(name), adapter), own_names(own), inputs[name])
        return loss_of(outputs)


class Dense(nn.Module):
    """A layer with the weight that its adapter's ``fold`` makes; behind it the bottleneck, which has none."""

    def __init__(self, layer: nn.Module, adapter: AdapterLayer) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        if isinstance(adapter, FoldableLayer):
            weight = adapter.kind.stored(self.layer, adapter.fold(adapter.kind.weight(self.layer)))
            return functional_call(self.layer, {"weight": weight}, x)
        y = self.layer(x)
        return y + adapter.up(F.gelu(adapter.down(y)))


def own_names(parameters: Tensors) -> Tensors:
    return {f"adapter.{name}": parameter for name, parameter in parameters.items()}


def loss_of(outputs: Tensors) -> Tensor:
    return torch.stack([y.sin().sum() for y in outputs.values()]).sum()


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def flat_hessian(blocks: dict[str, Tensors], parameters: Tensors) -> Tensor:
    """The blocks of torch.func's Hessian as one matrix."""
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    rows = [torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in sizes], 1) for a in sizes]
    return torch.cat(rows)


def equal(found: Tensor, expected: Tensor) -> None:
    assert float(expected.detach().norm()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("variant", "init"), CASES)
@pytest.mark.parametrize("name", [*LINEAR, *CONVOLUTIONS, "embedding_scaled"])
def test_hessian_vector_products(variant: str, init: str, name: str) -> None:
    """By differentiating twice, in weights and inputs."""
    if variant == "bottleneck" and name in CONVOLUTIONS:
        pytest.skip("a bottleneck goes on no convolution")
    case = Case(variant, init, [name])
    inputs = [*case.parameters.values(), *case.x.values()]
    vectors = [torch.randn_like(tensor) for tensor in inputs]
    products = []
    for loss in (case.loss, case.dense_loss):
        first = torch.autograd.grad(loss(case.parameters, case.x), inputs, create_graph=True)
        inner = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
        second = torch.autograd.grad(inner, inputs, materialize_grads=True)
        products.append(torch.cat([g.flatten() for g in second]))
    equal(*products)


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_a_gradient_penalty_trains_what_the_dense_weights_would(variant: str, init: str) -> None:
    """‖∂loss/∂x‖² as a part of the loss."""
    case = Case(variant, init, LINEAR)
    gradients = []
    for loss in (case.loss, case.dense_loss):
        slopes = torch.autograd.grad(loss(case.parameters, case.x), list(case.x.values()), create_graph=True)
        penalty = torch.stack([slope.square().sum() for slope in slopes]).sum()
        trained = torch.autograd.grad(penalty, list(case.parameters.values()), materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in trained]))
    equal(*gradients)


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "hessian": lambda f, p: flat_hessian(hessian(f)(p), p),
    "jacrev(jacrev)": lambda f, p: flat_hessian(jacrev(jacrev(f))(p), p),
    "grad": lambda f, p: flat(grad(f)(p)),
    "jvp": lambda f, p: jvp(f, (p,), ({n: torch.ones_like(t) for n, t in p.items()},))[1],
    "jvp(grad)": lambda f, p: flat(jvp(grad(f), (p,), ({n: torch.ones_like(t) for n, t in p.items()},))[1]),
    "vmap(grad), a batch of adapters": lambda f, p: flat(
        vmap(grad(f))({n: torch.stack([t, 2 * t, -t]) for n, t in p.items()})
    ),
}


@pytest.mark.parametrize(("variant", "init"), CASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_the_parameters(variant: str, init: str, transform: str) -> None:
    names = ["linear_without_bias", "embedding"] + ["conv2d_without_bias"] * (variant != "bottleneck")
    case = Case(variant, init, names)
    p = {name: parameter.detach() for name, parameter in case.parameters.items()}
    with torch.no_grad():
        found, expected = (TRANSFORMS[transform](lambda p, f=f: f(p, {}), p) for f in (case.loss, case.dense_loss))
    equal(found, expected)


@pytest.mark.parametrize(("variant", "init"), CASES)
def test_gradients_per_sample(variant: str, init: str) -> None:
    names = [*LINEAR, "embedding_scaled"] + CONVOLUTIONS * (variant != "bottleneck")
    case = Case(variant, init, names)
    p = {name: parameter.detach() for name, parameter in case.parameters.items()}

    def loss(parameters: Tensors, sample: Tensors) -> Tensor:
        return loss_of(functional_call(case.model, parameters, (), sample).outputs)

    found = vmap(grad(loss), in_dims=(None, 0))(p, case.inputs)
    for i in range(3):
        sample = {name: x[i] for name, x in case.inputs.items()}
        alone = loss_of(case.model(**sample).outputs)
        expected = torch.autograd.grad(alone, list(case.parameters.values()))
        equal(torch.cat([g[i].flatten() for g in found.values()]), torch.cat([g.flatten() for g in expected]))


@pytest.mark.parametrize(("variant", "init"), CASES)
@pytest.mark.parametrize(
    "strategy", [{}, {"vectorize": True}, {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}]
)
def test_hessians_in_the_inputs(variant: str, init: str, strategy: dict[str, object]) -> None:
    """torch.autograd.functional, which batches the backward pass of a graph that was made without a transform."""
    case = Case(variant, init, LINEAR)
    x = {name: x.detach()[0] for name, x in case.x.items()}
    losses = [
        lambda *x, f=f: f(case.parameters, dict(zip(case.x, x, strict=True))) for f in (case.loss, case.dense_loss)
    ]
    found, expected = (torch.autograd.functional.hessian(f, tuple(x.values()), **strategy) for f in losses)
    for i in range(len(x)):
        equal(found[i][i], expected[i][i])


@pytest.mark.parametrize("variant", PAIR_VARIANTS)
def test_forward_mode_through_the_model(variant: str) -> None:
    case = Case(variant, "olora", LINEAR)
    tangents = []
    for loss in (case.loss, case.dense_loss):
        with forward_ad.dual_level(), torch.no_grad():
            x = {name: forward_ad.make_dual(x.detach(), torch.ones_like(x)) for name, x in case.x.items()}
            tangents.append(forward_ad.unpack_dual(loss(case.parameters, x)).tangent)
    equal(*tangents)


def test_dropout_under_a_transform_is_torchs() -> None:
    case = Case("lora", "kaiming", ["linear"])
    case.model.get_submodule("linear.rankwise.adapters.default").dropout = 0.5
    p = {name: parameter.detach() for name, parameter in case.parameters.items()}
    found = vmap(case.loss, in_dims=(None, 0), randomness="different")(
        p, {"linear": case.inputs["linear"].detach()[:1].expand(50, 5, 12)}
    )
    assert len({round(float(value), 9) for value in found}) == 50
