"""How far an adapter's first step agrees with full fine-tuning's, layer by layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapted.adapted import Adapted
from rankwise.algebra.low_rank import LowRank
from rankwise.errors import AttachError
from rankwise.evidence import exact_gradients
from rankwise.methods import row
from rankwise.pair import pairs
from rankwise.shapes import Float
from rankwise.variants.lora import FoldedLoraLayer, LoraLayer

# What an optimizer makes of its first gradient, in units of −lr. Adam's bias-corrected moments are then g and g², so
# its step is g/(|g| + eps), the sign wherever |g| is well above eps.
FIRST_UPDATES: dict[str, Callable[[Tensor], Tensor]] = {"sgd": lambda G: G, "adamw": torch.sign}


@dataclass(frozen=True)
class Alignment:
    """A low-rank step D beside full fine-tuning's step F.

    Attributes:
        cosine: ⟨D, F⟩ / (‖D‖ ‖F‖); 0 where either is zero.
        relative_size: ‖D‖_F / ‖F‖_F at the same learning rate.
    """

    cosine: float
    relative_size: float


def first_step(
    G: Float[Tensor, "out in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], scale: float, optimizer: str
) -> LowRank:
    """D: the first step's change of W = W₀ + s(BA − B₀A₀) to first order, in units of −lr. Rank 2r.

    The pair's gradients are g_A = s BᵀG [r, in] and g_B = s GAᵀ [out, r]; the optimizer turns each into an update u
    and D = s(B u(g_A) + u(g_B) A):

        sgd:    D = s²(BBᵀG + GAᵀA)
        adamw:  D = s(B sign(BᵀG) + sign(GAᵀ)A)    (s > 0; where B = 0, sign(BᵀG) = 0 as well)

    Source: Wang 2024, arXiv 2407.05000 (LoRA-GA), section 3; the sign form is that of Adam's first step.

    Args:
        G: dL/dW at the current, adapted W.
        A, B: the effective pair (start + δ).
        optimizer: "sgd" or "adamw".

    Raises:
        SpecError: an unknown optimizer.
    """
    update = row(FIRST_UPDATES, optimizer, "optimizer")
    return LowRank(torch.cat([B, update(scale * (G @ A.T))], dim=1), torch.cat([update(scale * (B.T @ G)), A]), scale)


def full_step(G: Float[Tensor, "out in"], optimizer: str) -> Float[Tensor, "out in"]:
    """F: what full fine-tuning's first step adds to W, in units of −lr: G for "sgd", sign(G) for "adamw"."""
    return row(FIRST_UPDATES, optimizer, "optimizer")(G)


def alignment(
    G: Float[Tensor, "out in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], scale: float, optimizer: str
) -> Alignment:
    """:func:`first_step` beside :func:`full_step`. Arguments as there.

    >>> import torch
    >>> G = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0, 0.0]))
    >>> alignment(G, A=torch.eye(1, 3), B=torch.zeros(2, 1), scale=2.0, optimizer="sgd")
    Alignment(cosine=1.0, relative_size=4.0)
    """
    low = first_step(G, A, B, scale, optimizer)
    full = full_step(G, optimizer)
    inner = float(scale * ((low.B.T @ full) * low.A).sum())
    low_size, full_size = float(low.norm()), float(torch.linalg.matrix_norm(full))
    if low_size == 0.0 or full_size == 0.0:
        return Alignment(0.0, 0.0)
    return Alignment(inner / (low_size * full_size), low_size / full_size)


def every_first_step(
    model: nn.Module,
    batches: Iterable[Any],
    optimizers: Iterable[str] = tuple(FIRST_UPDATES),
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, dict[str, Alignment]]:
    """Optimizer → site → :func:`alignment` of the active adapter, from the exact mean gradient of the batches.

    The gradients are those of the model as it is now, adapter included and without dropout; the model is left as it
    was. One pass serves all optimizers. Other arguments and errors as for :func:`first_step_alignment`.
    """
    optimizers = tuple(optimizers)
    for optimizer in optimizers:
        row(FIRST_UPDATES, optimizer, "optimizer")
    active = pairs(model)
    for pair in active:
        if type(pair.layer) not in (LoraLayer, FoldedLoraLayer):
            raise AttachError(
                f"{pair.name}: the first step is compared for W₀ + s·BA; expected the variant 'lora', "
                f"found a {type(pair.layer).__name__}"
            )
    adapted = Adapted.of(model)
    layers = {pair.name: adapted.layer(pair.name) for pair in active}
    evidence = exact_gradients(model, layers, batches, loss)
    result: dict[str, dict[str, Alignment]] = {optimizer: {} for optimizer in optimizers}
    with torch.no_grad():
        for pair in active:
            G = evidence.pop(pair.name).matrix  # freed layer by layer
            A, B = pair.A.to(G), pair.B.to(G)
            for optimizer in optimizers:
                result[optimizer][pair.name] = alignment(G, A, B, pair.scale, optimizer)
    return result


def first_step_alignment(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: str = "sgd",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, float]:
    """The cosine between the active adapter's next step, were it the first, and full fine-tuning's, per site.

    1 means that the adapter moves each weight in the direction in which full fine-tuning would;
    :func:`every_first_step` gives the relative sizes too.

    Args:
        batches: as for :func:`rankwise.gradients`; the run's own first batches are the ones to ask about.
        optimizer: "sgd", or "adamw", whose first step is the sign of the gradient.
        loss: ``loss(model, batch)``, where batches are not dicts for ``model(**batch)`` with labels.

    Returns:
        Site name → cosine in [−1, 1].

    Raises:
        SpecError: an unknown optimizer. AttachError: no adapter, not exactly one active, or not of variant "lora".
        EvidenceError: as for :func:`rankwise.gradients`.

    >>> import torch, rankwise as rw
    >>> model = rw.attach(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)), rw.LoRA(rank=2))
    >>> loss = lambda model, x: model(x).square().mean()
    >>> sorted(first_step_alignment(model, [torch.randn(5, 8)], loss=loss))
    ['0', '1']
    """
    alignments = every_first_step(model, batches, (optimizer,), loss)[optimizer]
    return {name: site.cosine for name, site in alignments.items()}
