"""Training in a random subspace: the measure of a task's intrinsic dimension.

Aghajanyan 2020, arXiv 2012.13255 (after Li 2018, arXiv 1804.08838): θ = θ₀ + P θ_d with P [D, d] random and fixed, and
only θ_d, d numbers for all D weights, trained. d₉₀ is the smallest d that reaches 90 % of what training all D reaches.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankwise.errors import AttachError, SpecError
from rankwise.planning import target_layers
from rankwise.shapes import Float, Int
from rankwise.sites import site_generator


class ProjectedWeight(nn.Module):
    """W = W₀ + λ c · P θ_d for one layer: a parametrisation of its weight.

    P has one entry, ±1, in each row: weight i moves with coordinate h(i), in the direction of its sign. So the columns
    of P are orthogonal, Pθ costs one look-up a weight, and with c = √(d/D) the map keeps lengths, ‖cPθ‖ ≈ ‖θ‖. (The
    paper takes Fastfood for P, as a dense Gaussian would not fit; Li 2018 compares dense, sparse and Fastfood.)

    Attributes:
        theta: θ_d, the point of the subspace; one tensor that all projected weights share.
        picks: h(i), plus d where the sign is negative: an index into [θ, −θ].
        gain: λ, trained with ``layer_scales`` (the paper's SAID), else None (DID).
    """

    def __init__(self, theta: nn.Parameter, picks: Int[Tensor, "out in"], c: float, *, layer_scale: bool) -> None:
        super().__init__()
        self.theta = theta
        self.c = c
        self.register_buffer("picks", picks)
        self.gain = nn.Parameter(torch.ones(())) if layer_scale else None

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W from W₀."""
        assert isinstance(self.picks, Tensor)
        # index_select's gradient adds up fifty times faster than an index expression's.
        step = (
            torch.cat([self.theta, -self.theta])
            .mul(self.c)
            .to(weight)
            .index_select(0, self.picks.flatten())
            .view_as(weight)
        )
        return weight + (step if self.gain is None else step * self.gain.to(weight))


def train_in_random_subspace(
    model: nn.Module,
    dimension: int,
    target_modules: str | Iterable[str] = "all-linear",
    *,
    layer_scales: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Freeze ``model`` but for ``dimension`` numbers, which move the weights of all targets in a random subspace.

    At the start the model is the pretrained one. Undone by :func:`leave_random_subspace`.

    Args:
        dimension: d, the trained numbers in all.
        layer_scales: train one scale a layer among them (the paper's SAID, d − m numbers for θ); else its DID.
        seed: of P.

    Returns:
        The same model.

    Raises:
        TargetError: as for :func:`rankwise.plan`. SpecError: d smaller than 1, or with scales not above the number of
        layers, or larger than the number of weights. AttachError: a layer without a plain weight.

    >>> import torch
    >>> model = train_in_random_subspace(torch.nn.Sequential(torch.nn.Linear(8, 16)), dimension=3)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    3
    """
    layers = target_layers(model, target_modules)
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or parametrize.is_parametrized(layer):
            kind = type(layer).__name__
            raise AttachError(f"{name}: expected a plain floating point weight to project, found a {kind}")
    total = sum(layer.get_parameter("weight").numel() for layer in layers.values())
    shared = dimension - (len(layers) if layer_scales else 0)
    if not 1 <= shared <= total:
        room = f"from {dimension - shared + 1} to {total:,}"
        raise SpecError(f"dimension: expected {room} for {len(layers)} layers, found {dimension}")
    model.requires_grad_(False)
    device = next(iter(layers.values())).get_parameter("weight").device
    theta = nn.Parameter(torch.zeros(shared, device=device))
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        picks = torch.randint(2 * shared, weight.shape, generator=site_generator(seed, name), dtype=torch.int32)
        projected = ProjectedWeight(theta, picks.to(device), math.sqrt(shared / total), layer_scale=layer_scales)
        parametrize.register_parametrization(layer, "weight", projected)
    return model


def leave_random_subspace(model: nn.Module) -> nn.Module:
    """Give every weight back as it was before :func:`train_in_random_subspace`, bit for bit."""
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return model
