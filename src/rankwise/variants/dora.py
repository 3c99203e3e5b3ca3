"""DoRA: train the length of each row of the weight apart from its direction (Liu 2024, arXiv 2402.09353).

    W' = m ⊙ (W + ΔW) / ‖W + ΔW‖        one norm and one trained magnitude per output, the norm not differentiated

The paper calls the norm column-wise: its matrices are the transpose of torch's. The norm is never taken of a dense
W + ΔW; with ΔW = s·B A (an anchor included: the stacked factors of the difference form) row o has

    ‖W_o + ΔW_o‖² = ‖W_o‖² + c_o,    c_o = s·B_o·(2 W Aᵀ + s·B A Aᵀ)_o

where ‖W_o‖ is constant. What is applied is the deviation d = m/‖W + ΔW‖ − 1, computed as such: the start is exactly
the pretrained model, and bf16 keeps the digits of d that 1 + d would lose.

In training, dropout acts on the input of ΔW alone: y = (1 + d) ⊙ (W x + ΔW·dropout(x)) + b. PEFT also drops the x of
d ⊙ W x, which costs a second product with W. Without dropout, and in evaluation, the two agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import fp32_or_finer
from rankwise.errors import MissingTensor, ShapeMismatch
from rankwise.in_place import is_transformed
from rankwise.layers.kinds import Kind
from rankwise.layers.low_rank_product import as_rows
from rankwise.shapes import Float
from rankwise.sites import Site, Start
from rankwise.variants.base import ALL, PairVariant
from rankwise.variants.lora import LoraLayer

MAGNITUDE = "lora_magnitude_vector"


class DoraLayer(LoraLayer):
    """LoRA's pair with a trained length per output.

    Attributes:
        magnitude [out]: m; the norm of each row of W + ΔW at the start.
        base_norm [out]: ‖W_o‖, constant.
    """

    additive: ClassVar[bool] = False
    base_norm: Tensor

    def __init__(
        self, site: Site, kind: Kind, dropout: float, start: Start, weight: Float[Tensor, "out in"], *, anchored: bool
    ) -> None:
        super().__init__(site, kind, dropout, start, anchored=anchored)
        self.register_buffer("base_norm", row_norms(weight), persistent=False)
        self.magnitude = nn.Parameter(row_norms(weight))
        # Training takes no magnitude through zero, but that of a row of zeros starts there.
        self.invertible = bool(self.base_norm.all())

    def norm(self, layer: nn.Module) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
        """‖W + ΔW‖ of each row, and what ΔW adds to its square; both constants for autograd."""
        device = self.base_norm.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.norm(layer)
        with torch.no_grad():
            term = self.delta()
            B, A = (half.detach().to(self.base_norm.dtype) for half in (term.B, term.A))  # from forward mode too
            mixed = torch.addmm(self.kind.project(layer, A), B, A @ A.T, beta=2.0, alpha=term.scale)
            added = (mixed * B).sum(1) * term.scale
            square = (added + self.base_norm.square()).clamp(min=0.0)
            return square.sqrt(), added

    def deviation(self, norm: Float[Tensor, " out"], added: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """d = m/‖W + ΔW‖ − 1 = ((m − ‖W‖) − (‖W + ΔW‖ − ‖W‖)) / ‖W + ΔW‖; differentiable in m.

        Of a row that is zero altogether, whose direction is undefined and whose output is zero whatever d, d = 0.
        """
        nowhere = norm == 0
        norm = norm.masked_fill(nowhere, 1.0)
        growth = added / (norm + self.base_norm)
        return ((self.magnitude - self.base_norm - growth) / norm).masked_fill(nowhere, 0.0)

    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        d = self.deviation(*self.norm(layer))
        return stretch(
            super().adapt(layer, x, y), d, self.kind.bias(layer), self.kind.output_axis, invertible=self.invertible
        )

    def change(self, weight: Float[Tensor, "n in"], rows: slice = ALL) -> Float[Tensor, "n in"]:
        """W' − W, from the dense norm: the definition that the factored one is tested against."""
        turned = weight + super().change(weight, rows)
        norm = row_norms(turned.detach())
        d = torch.where(norm > 0, (self.magnitude[rows] - norm) / norm, 0.0).to(weight.dtype)
        return turned - weight + d[:, None] * turned

    def extra_tensors(self) -> dict[str, Tensor]:
        shape = (1, -1, 1, 1) if self.kind.name == "conv2d" else (-1,)
        return {MAGNITUDE: self.magnitude.view(shape)}


def row_norms(weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """‖W_o‖ of each row, in fp32 or finer."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=fp32_or_finer(weight.dtype))
    return norms


def stretch(v: Tensor, d: Float[Tensor, " out"], bias: Tensor | None, axis: int, *, invertible: bool) -> Tensor:
    """v + d ⊙ (v − b), in v's memory: a layer's output whose part without the bias b is multiplied by 1 + d per output.

    Args:
        v: the layer's output, outputs along ``axis``, a negative number.
        invertible: 1 + d is nowhere zero, so that without a bias v need not be kept beside the result.
    """
    shape = (-1, *(1,) * (-1 - axis))
    factor = d.to(v.dtype).view(shape)
    if v.is_nested:  # whose products with matrices are all that every kind of them has
        return v + F.linear(v, torch.diag(d).to(v.dtype), None if bias is None else (-d * bias).to(v.dtype))
    if is_transformed() or (bias is not None and bias.requires_grad):
        return v + factor * (v if bias is None else v - bias.to(v.dtype).view(shape))
    z = v - bias.to(v.dtype).view(shape) if bias is not None else None if invertible else v.clone()
    if not torch.is_grad_enabled():
        return v.addcmul_(v if z is None else z, factor)
    return _Stretch.apply(v, z, d, shape)  # type: ignore[no-any-return, no-untyped-call]


class _Stretch(torch.autograd.Function):
    """v + d ⊙ z for z = v − constant; without z, z = v, found again from the result.

    z's share of the gradient goes to v at once, in one product. That z comes from v counts in second derivatives.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, z: Tensor | None, d: Tensor, shape: tuple[int, ...]) -> Tensor:
        v.addcmul_(v if z is None else z, d.to(v.dtype).view(shape))
        ctx.mark_dirty(v)
        ctx.save_for_backward(v if z is None else z, d)
        ctx.shape, ctx.of_result = shape, z is None
        return v

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        kept, d = ctx.saved_tensors
        grad_v = grad_d = None
        if ctx.needs_input_grad[0]:
            grad_v = torch.addcmul(grad, grad, d.to(grad.dtype).view(ctx.shape))
        if ctx.needs_input_grad[2]:
            grad_d = _sum_of_products(grad, kept, -len(ctx.shape)).to(d.dtype)
            if ctx.of_result:
                grad_d = grad_d / (1 + d).masked_fill(d == -1, 1)  # where the result, and so the sum, is zero
        return grad_v, None, grad_d, None


def _sum_of_products(a: Tensor, b: Tensor, axis: int) -> Float[Tensor, " out"]:
    """Σ a ⊙ b over all axes but one; on a CPU a slice at a time, so that the products stay in its cache."""
    if axis != -1 or a.device.type != "cpu":
        return (a * b).sum([other for other in range(-a.dim(), 0) if other != axis])
    rows = max(2**17 // a.shape[-1], 1)
    parts = zip(torch.split(as_rows(a), rows), torch.split(as_rows(b), rows), strict=True)
    return torch.stack([(x * y).sum(0) for x, y in parts]).sum(0)


@dataclass(frozen=True)
class Dora(PairVariant):
    """W' = m ⊙ (W + ΔW)/‖W + ΔW‖ per output, m trained."""

    marks: ClassVar[Mapping[str, Any]] = MappingProxyType({"use_dora": True})
    tensors: ClassVar[tuple[str, ...]] = (MAGNITUDE,)

    def parameters(self, site: Site) -> int:
        return super().parameters(site) + site.shape[0]

    def build(self, site: Site, kind: Kind, weight: Tensor, start: Start, dropout: float) -> DoraLayer:
        layer = DoraLayer(site, kind, dropout, start, weight, anchored=start.needs_anchor)
        with torch.no_grad():  # ΔW is zero here, but for a start that is meant to change the model
            layer.magnitude.copy_(row_norms(weight + layer.delta().dense()))
        return layer

    def restore(self, site: Site, kind: Kind, weight: Tensor, delta: LowRank, extra: Mapping[str, Tensor]) -> DoraLayer:
        layer = DoraLayer(site, kind, 0.0, Start(delta.A, delta.B), weight, anchored=False)
        if MAGNITUDE not in extra:
            raise MissingTensor(
                f"{site.name}: no {MAGNITUDE}, which use_dora promises; expected {site.shape[0]} numbers"
            )
        saved = extra[MAGNITUDE].flatten()
        if saved.shape != layer.magnitude.shape:
            raise ShapeMismatch(
                f"{site.name}: {MAGNITUDE} has {saved.numel()} numbers; expected one for each of the {site.shape[0]}"
            )
        with torch.no_grad():
            layer.magnitude.copy_(saved)
        return layer
