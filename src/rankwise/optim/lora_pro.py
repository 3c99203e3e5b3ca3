"""LoRA-Pro: move the pair so that the weight moves as full fine-tuning would move it (Wang 2024, arXiv 2407.18242).

A step (−g^A, −g^B) of the pair moves W = W₀ + s(BA − B₀A₀) by −g̃ with g̃ = s(B g^A + g^B A), to first order. The
ordinary gradients g_A = s BᵀG and g_B = s GAᵀ are one choice of (g^A, g^B); LoRA-Pro takes the one whose g̃ comes
closest to the weight's own gradient G, which neither needs nor forms G:

    g^A = s⁻² (BᵀB)⁻¹ g_A + X A                             [r, in]
    g^B = s⁻² (I − B(BᵀB)⁻¹Bᵀ) g_B (AAᵀ)⁻¹ − B X            [out, r]
    g̃   = P_B G + (I − P_B) G P_A                           [out, in]

with P_B the projector on B's columns and P_A that on A's rows. X [r, r] does not change g̃; among all X the one is
taken that keeps (g^A, g^B) closest to (g_A, g_B), which solves the Sylvester equation

    BᵀB X + X AAᵀ = −s⁻² (BᵀB)⁻¹ g_A Aᵀ.

The paper writes s for α/r as here. Its A and B have torch's shapes, so no factor is transposed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.attaching import Pair, pairs
from rankwise.errors import CheckpointError, SpecError, TrainingError
from rankwise.methods import nearest
from rankwise.optim.checks import check_betas, check_number
from rankwise.shapes import Float
from rankwise.variants.lora import LoraLayer

# --- the equivalent gradient -----------------------------------------------------------------------------------------


def equivalent_gradients(
    A: Float[Tensor, "*n r in"],
    B: Float[Tensor, "*n out r"],
    grad_A: Float[Tensor, "*n r in"],
    grad_B: Float[Tensor, "*n out r"],
    scale: float,
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """(g^A, g^B) of the formulas above: the step of the pair that moves the weight most like G.

    Inverses are pseudo-inverses: a half that is zero, as B is at the start, or has lost rank projects on what it
    spans (P_B = 0 for B = 0, and g̃ = G P_A). Both inverses and the Sylvester equation come from the singular values
    of A and B themselves, never from BᵀB, so a pair's condition number is not squared, and no system is larger than
    r × r.

    Args:
        A, B: the effective pair (start + δ), or a batch of pairs of equal shape.
        grad_A, grad_B: dL/dA = s BᵀG and dL/dB = s GAᵀ (for δA and δB they are the same).
        scale: s.

    >>> import torch
    >>> G, A, B = torch.randn(4, 6), torch.randn(2, 6), torch.zeros(4, 2)  # B = 0: only B can move the weight
    >>> g_A, g_B = equivalent_gradients(A, B, 2.0 * B.T @ G, 2.0 * G @ A.T, scale=2.0)
    >>> torch.allclose(2.0 * g_B @ A, G @ torch.linalg.pinv(A) @ A, atol=1e-5), bool(g_A.any())
    (True, False)
    """
    return _solve(_factors(A, B), grad_A, grad_B, scale)


def equivalent_gradient(
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    grad_A: Float[Tensor, "r in"],
    grad_B: Float[Tensor, "out r"],
    scale: float,
) -> LowRank:
    """g̃ = s(B g^A + g^B A) = P_B G + (I − P_B) G P_A, [out, in], of rank 2r. Arguments as above."""
    g_A, g_B = equivalent_gradients(A, B, grad_A, grad_B, scale)
    return _first_order(A, B, g_A, g_B, scale)


def _first_order(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, scale: float) -> LowRank:
    """What the direction (g_A, g_B) of the pair is to the weight: s(B g_A + g_B A)."""
    return LowRank(torch.cat([B, g_B], dim=1), torch.cat([g_A, A]), scale)


@dataclass(frozen=True)
class _Factors:
    """B = P diag(b) Uᵀ and A = V diag(a) Qᵀ, with 1/b² and 1/a² that are 0 where b or a is."""

    P: Float[Tensor, "*n out r"]
    b: Float[Tensor, "*n r"]
    U: Float[Tensor, "*n r r"]
    Q: Float[Tensor, "*n in r"]
    a: Float[Tensor, "*n r"]
    V: Float[Tensor, "*n r r"]
    inverse_b2: Float[Tensor, "*n r"]
    inverse_a2: Float[Tensor, "*n r"]


def _factors(A: Float[Tensor, "*n r in"], B: Float[Tensor, "*n out r"]) -> _Factors:
    P, b, U = _svd(B)
    Q, a, V = _svd(A.mT)
    return _Factors(P, b, U, Q, a, V, _inverse_square(b, B), _inverse_square(a, A))


def _svd(M: Float[Tensor, "*n m r"]) -> tuple[Float[Tensor, "*n m r"], Float[Tensor, "*n r"], Float[Tensor, "*n r r"]]:
    """The thin SVD M = P diag(σ) Uᵀ of a tall matrix, by QR."""
    q, triangle = torch.linalg.qr(M)
    u, sigma, vh = torch.linalg.svd(triangle)
    return q @ u, sigma, vh.mT


def _inverse_square(sigma: Float[Tensor, "*n r"], matrix: Tensor) -> Float[Tensor, "*n r"]:
    """1/σ², and 0 where σ is zero to working precision (as in torch.linalg.pinv) or its square would underflow."""
    kind = torch.finfo(sigma.dtype)
    smallest = kind.tiny**0.5
    rounding = sigma.amax(-1, keepdim=True) * (kind.eps * max(matrix.shape[-2:]))
    inverse: Tensor = (sigma > rounding.clamp_min(smallest)) * sigma.clamp_min(smallest).square().reciprocal()
    return inverse


def _solve(
    f: _Factors, grad_A: Float[Tensor, "*n r in"], grad_B: Float[Tensor, "*n out r"], scale: float
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """(g^A, g^B), in the coordinates of U and V, where BᵀB = diag(b²) and AAᵀ = diag(a²)."""
    along_A, along_B = f.U.mT @ grad_A / scale**2, grad_B @ f.V / scale**2
    P, Q, b, a = f.P, f.Q, f.b[..., None, :], f.a[..., None, :]
    shrunk_A = f.inverse_b2[..., :, None] * along_A  # s⁻² (BᵀB)⁻¹ g_A
    X = _sylvester(f.b.square(), f.a.square(), -(shrunk_A @ Q) * a)
    spans = (f.b.square() * f.inverse_b2)[..., :, None]  # 1, or 0 where b is
    outside_B = along_B - P @ (spans * (P.mT @ along_B))  # s⁻² (I − P_B) g_B
    g_A = f.U @ (shrunk_A + (X * a) @ Q.mT)
    g_B = (outside_B * f.inverse_a2[..., None, :] - (P * b) @ X) @ f.V.mT
    return g_A, g_B


def _sylvester(
    left: Float[Tensor, "*n r"], right: Float[Tensor, "*n r"], C: Float[Tensor, "*n r r"]
) -> Float[Tensor, "*n r r"]:
    """X with diag(left) X + X diag(right) = C; where both are zero C is zero as well."""
    total = left[..., :, None] + right[..., None, :]
    return C / torch.where(total > 0, total, 1.0)


# --- one step, as functions ------------------------------------------------------------------------------------------

State = dict[str, Any]  # of one parameter or pair: "step", "exp_avg", "exp_avg_sq"; empty before the first step


def adam_direction(gradient: Tensor, state: State, betas: tuple[float, float], eps: float) -> Tensor:
    """m̂ / (√v̂ + eps) with bias-corrected moments, as torch.optim.AdamW has it; ``state`` is updated in place."""
    if not state:
        state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    # The corrections 1 − βᵗ are numbers: taken out of the division they cost one pass over the tensor, not two.
    correction_mean, correction_size = 1 - betas[0] ** state["step"], (1 - betas[1] ** state["step"]) ** 0.5
    size = square.sqrt().add_(eps * correction_size)
    return torch.div(mean, size, out=size).mul_(correction_size / correction_mean)


def sgd_pairs(
    A: Float[Tensor, "n r in"],
    B: Float[Tensor, "n out r"],
    grad_A: Float[Tensor, "n r in"],
    grad_B: Float[Tensor, "n out r"],
    scale: float,
    states: Sequence[State],
    options: Mapping[str, Any],
) -> tuple[Float[Tensor, "n r in"], Float[Tensor, "n out r"]]:
    """SGD form, for n pairs of equal shape and scale: the directions are the equivalent gradients. No state."""
    return equivalent_gradients(A, B, grad_A, grad_B, scale)


def adamw_pairs(
    A: Float[Tensor, "n r in"],
    B: Float[Tensor, "n out r"],
    grad_A: Float[Tensor, "n r in"],
    grad_B: Float[Tensor, "n out r"],
    scale: float,
    states: Sequence[State],
    options: Mapping[str, Any],
) -> tuple[Float[Tensor, "n r in"], Float[Tensor, "n out r"]]:
    """AdamW form, for n pairs of equal shape and scale: Adam's moments of g̃, its direction N projected once more.

    g̃, N and the moments are [out, in], so a pair's state is as large as full fine-tuning's. N takes the place of G:
    the pair's gradients would be s BᵀN and s NAᵀ, and their equivalent gradients are the directions.
    """
    factors = _factors(A, B)
    g_A, g_B = _solve(factors, grad_A, grad_B, scale)
    projected_A, projected_B = torch.empty_like(A), torch.empty_like(B)
    for i, state in enumerate(states):  # one [out, in] at a time
        N = adam_direction(_first_order(A[i], B[i], g_A[i], g_B[i], scale).dense(), state, **options)
        torch.mul(B[i].T @ N, scale, out=projected_A[i])
        torch.mul(N @ A[i].T, scale, out=projected_B[i])
    return _solve(factors, projected_A, projected_B, scale)


def sgd_plain(gradient: Tensor, state: State, options: Mapping[str, Any]) -> Tensor:
    """The gradient."""
    return gradient


def adamw_plain(gradient: Tensor, state: State, options: Mapping[str, Any]) -> Tensor:
    """Adam's direction."""
    return adam_direction(gradient, state, **options)


@dataclass(frozen=True)
class Form:
    """How one form of LoRA-Pro makes directions from gradients.

    Attributes:
        pairs: for a batch of pairs. plain: for a tensor that is in no pair.
        options: what of a parameter group both take.
    """

    pairs: Callable[..., tuple[Tensor, Tensor]]
    plain: Callable[[Tensor, State, Mapping[str, Any]], Tensor]
    options: tuple[str, ...] = ()


FORMS: dict[str, Form] = {
    "sgd": Form(sgd_pairs, sgd_plain),
    "adamw": Form(adamw_pairs, adamw_plain, options=("betas", "eps")),
}


# --- the optimizer ---------------------------------------------------------------------------------------------------


class LoraPro(torch.optim.Optimizer):
    """LoRA-Pro on typed pairs: p ← (1 − lr·weight_decay) p − lr·direction for every trained tensor p.

    Everything that is trained must be handed over: the pairs as pairs, and what is in none (a DoRA magnitude, a new
    head) as ``others``, which get plain SGD or AdamW. :meth:`for_model` collects both.

    With an anchored start the trained tensors are δA and δB. The gradients are the same, the formulas see the
    effective A and B, and weight decay pulls δ to zero: towards the pretrained model.

    A clip of the gradients' common norm is fine; a clip per tensor breaks the relation of g_A to g_B that the
    equivalent gradient rests on.

    Args:
        pairs: from :func:`rankwise.pairs`.
        lr: of everything in ``others`` too, unless a group there brings its own.
        form: "sgd", or "adamw". AdamW keeps two moments of size [out, in] for each pair, the memory that full
            fine-tuning's optimizer would take.
        betas, eps: of the AdamW form.
        others: trained tensors that are in no pair, or groups of them (dicts with ``params`` and options).

    Raises:
        SpecError: an option out of range, a pair that is frozen or given twice, a trained tensor of an adapter layer
            that is neither in a pair nor in ``others``.

    >>> import torch, rankwise as rw
    >>> model = rw.attach(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)), rw.LoRA(rank=2))
    >>> optimizer = LoraPro(rw.pairs(model), lr=1e-3, form="adamw")
    >>> model(torch.randn(5, 8)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        lr: float = 1e-4,
        form: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
    ) -> None:
        if form not in FORMS:
            raise SpecError(f"form: expected one of {', '.join(FORMS)}, found {form!r}{nearest(form, FORMS)}")
        check_number("lr", lr, above_zero=True)
        check_number("eps", eps, above_zero=True)
        check_number("weight_decay", weight_decay, above_zero=False)
        check_betas(betas)
        self.pairs = tuple(pairs)
        groups = [{"params": [p for pair in self.pairs for p in pair.parameters], "name": "pairs"}, *_groups(others)]
        _check_complete(self.pairs, [p for group in groups for p in group["params"]])
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "form": form}
        super().__init__(groups, defaults)

    @classmethod
    def for_model(cls, model: nn.Module, lr: float = 1e-4, **options: Any) -> "LoraPro":
        """The optimizer of everything trainable in ``model``: the active adapter's pairs, and the rest as others.

        Raises:
            AttachError: the model has no adapter, or not exactly one is active.
        """
        own = pairs(model)
        paired = {id(p) for pair in own for p in pair.parameters}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
        return cls(own, lr, others=rest, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. A pair or tensor without a gradient (an expert that no token chose) is left alone.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.

        Raises:
            TrainingError: a gradient on one half of a pair only, NaN or infinity.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first, *rest = self.param_groups
        for alike in self._batches():
            _step_pairs(alike, [self.state[pair.parameters[0]] for pair in alike], first)
        for group in rest:
            form = FORMS[group["form"]]
            options = {name: group[name] for name in form.options}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _move(parameter, form.plain(at_least_fp32(parameter.grad), self.state[parameter], options), group)
        return loss

    def _batches(self) -> list[list[Pair]]:
        """The pairs that have gradients; together where shape, scale and device are equal."""
        batches: dict[Any, list[Pair]] = {}
        for pair in self.pairs:
            of_A, of_B = pair.parameters
            if of_A.grad is None and of_B.grad is None:
                continue
            if of_A.grad is None or of_B.grad is None:
                raise TrainingError(f"{pair.name}: one half of the pair has a gradient, the other none; expected both")
            key = of_A.shape, of_B.shape, of_A.dtype, of_A.device, pair.scale
            batches.setdefault(key, []).append(pair)
        return list(batches.values())

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and the names of the pairs, so that it goes back to the pairs it came from."""
        return {**super().state_dict(), "pairs": [pair.name for pair in self.pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state over: from here training goes on bit for bit.

        Raises:
            CheckpointError: it was saved for other pairs or another form.
        """
        own, saved = [pair.name for pair in self.pairs], state_dict.get("pairs")
        if saved != own:
            raise CheckpointError(f"optimizer state: expected the pairs {own}, found {saved}")
        form = state_dict["param_groups"][0]["form"]
        if form != self.param_groups[0]["form"]:
            raise CheckpointError(f"optimizer state: expected form {self.param_groups[0]['form']!r}, found {form!r}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "pairs"})
        # torch casts moments to the parameter's dtype, which would round them; put them back as they were saved.
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def _step_pairs(alike: Sequence[Pair], states: Sequence[State], group: Mapping[str, Any]) -> None:
    """One step of pairs of equal shape and scale.

    Raises:
        TrainingError: a gradient, A or B holds NaN or infinity. None of these pairs has moved then.
    """
    form = FORMS[group["form"]]
    grad_A = torch.stack([at_least_fp32(_gradient(pair.parameters[0])) for pair in alike])
    grad_B = torch.stack([at_least_fp32(_gradient(pair.parameters[1])) for pair in alike])
    A = torch.stack([at_least_fp32(pair.A) for pair in alike])
    B = torch.stack([at_least_fp32(pair.B) for pair in alike])
    finite = sum(t.sum((1, 2)) for t in (grad_A, grad_B, A, B)).isfinite()  # type: ignore[union-attr]
    if not bool(finite.all()):
        broken = [pair.name for pair, fine in zip(alike, finite.tolist(), strict=True) if not fine]
        raise TrainingError(
            f"{broken[0]}: its gradient or its pair holds NaN or infinity ({len(broken)} pairs like this); "
            f"lower lr (now {group['lr']:g}), clip the gradients, or train in fp32 or bf16"
        )
    options = {name: group[name] for name in form.options}
    directions = form.pairs(A, B, grad_A, grad_B, alike[0].scale, states, options)
    for pair, direction_A, direction_B in zip(alike, *directions, strict=True):
        of_A, of_B = pair.parameters
        _move(of_A, direction_A, group)
        _move(of_B, direction_B, group)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _move(parameter: Tensor, direction: Tensor, group: Mapping[str, Any]) -> None:
    """p ← (1 − lr·weight_decay) p − lr·direction, rounded once."""
    moved = at_least_fp32(parameter) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction
    parameter.copy_(moved)


def _groups(others: Iterable[Any]) -> list[dict[str, Any]]:
    """Tensors, or groups of them, as groups; none where there is nothing."""
    given = list(others)
    if given and all(isinstance(group, Mapping) for group in given):
        return [{"name": "others", **group, "params": list(group["params"])} for group in given]
    return [{"name": "others", "params": given}] if given else []


def _check_complete(pairs: tuple[Pair, ...], given: list[Tensor]) -> None:
    """``given`` has every trained tensor of the pairs' layers, and has it once."""
    if not pairs:
        raise SpecError("pairs: expected at least one, as rankwise.pairs(model) gives them, found none")
    once = {id(p) for p in given}
    if len(once) != len(given):
        raise SpecError("pairs, others: a tensor is given twice; expected every one once")
    for pair in pairs:
        if not isinstance(pair.layer, LoraLayer):
            raise SpecError(
                f"{pair.name}: LoRA-Pro's equivalent gradient is that of s·BA; expected the variant 'lora' or 'dora', "
                f"found a {type(pair.layer).__name__}; train it with AdamW"
            )
        if not all(p.requires_grad for p in pair.parameters):
            raise SpecError(f"{pair.name}: expected both halves of the pair to be trainable, found a frozen one")
        for name, parameter in pair.layer.named_parameters():
            if parameter.requires_grad and id(parameter) not in once:
                raise SpecError(
                    f"{pair.name}: its trainable {name!r} is in no pair and would never be stepped; "
                    f"pass it in others=, or use LoraPro.for_model(model, ...)"
                )
