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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.algebra.low_rank import LowRank
from rankwise.errors import SpecError
from rankwise.methods import nearest
from rankwise.optim.checks import check_betas, check_number
from rankwise.optim.choice import choice_of
from rankwise.optim.elementwise import State, adam_direction, sgd_direction
from rankwise.optim.pair_optimizer import Direction, PairOptimizer
from rankwise.pair import Pair
from rankwise.shapes import Float

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


# --- the directions --------------------------------------------------------------------------------------------------


def sgd_pairs(
    A: Float[Tensor, "*n r in"],
    B: Float[Tensor, "*n out r"],
    grad_A: Float[Tensor, "*n r in"],
    grad_B: Float[Tensor, "*n out r"],
    scale: float,
    state: State,
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """SGD form: the directions are the equivalent gradients. No state."""
    return equivalent_gradients(A, B, grad_A, grad_B, scale)


def adamw_pairs(
    A: Float[Tensor, "*n r in"],
    B: Float[Tensor, "*n out r"],
    grad_A: Float[Tensor, "*n r in"],
    grad_B: Float[Tensor, "*n out r"],
    scale: float,
    state: State,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Float[Tensor, "*n r in"], Float[Tensor, "*n out r"]]:
    """AdamW form: Adam's moments of g̃, its direction N projected once more.

    g̃, N and the moments are [out, in], so a pair's state is as large as full fine-tuning's. N takes the place of G:
    the pair's gradients would be s BᵀN and s NAᵀ, and their equivalent gradients are the directions.
    """
    factors = _factors(A, B)
    g_A, g_B = _solve(factors, grad_A, grad_B, scale)
    tangent = torch.cat([B, g_B], dim=-1) @ torch.cat([scale * g_A, scale * A], dim=-2)  # g̃
    N = adam_direction(tangent, state, betas, eps)
    return _solve(factors, scale * (B.mT @ N), scale * (N @ A.mT), scale)


@dataclass(frozen=True)
class Form:
    """One form of LoRA-Pro: the directions of pairs and of tensors in no pair, and the options that both take."""

    pairs: Direction
    others: Callable[..., Tensor]
    options: tuple[str, ...] = ()


FORMS: dict[str, Form] = {
    "sgd": Form(sgd_pairs, sgd_direction),
    "adamw": Form(adamw_pairs, adam_direction, options=("betas", "eps")),
}


class LoraPro(PairOptimizer):
    """LoRA-Pro; :class:`~rankwise.optim.pair_optimizer.PairOptimizer` says what pair optimizers share.

    A clip of the gradients' common norm is fine; a clip per tensor breaks the relation of g_A to g_B that the
    equivalent gradient rests on.

    Args:
        pairs: from :func:`rankwise.pairs`.
        lr: of everything in ``others`` too, unless a group there brings its own.
        form: "sgd", or "adamw". AdamW keeps two moments of size [out, in] for each pair, the memory that full
            fine-tuning's optimizer would take.
        betas, eps: of the AdamW form.
        others: trained tensors that are in no pair, or groups of them (dicts with ``params`` and options); they are
            stepped by plain SGD or AdamW, as ``form`` says.

    Raises:
        SpecError: an option out of range, a pair that is frozen or given twice, a trained tensor of an adapter layer
            that is neither in a pair nor in ``others``.

    >>> import torch, rankwise as rw
    >>> model = rw.attach(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)), rw.LoRA(rank=2))
    >>> optimizer = LoraPro(rw.pairs(model), lr=1e-3, form="adamw")
    >>> model(torch.randn(5, 8)).square().mean().backward()
    >>> optimizer.step()
    """

    invariant: ClassVar[bool] = True
    dense: ClassVar[bool] = True

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
        check_betas(betas)
        check_number("eps", eps, above_zero=True)
        given = {"betas": tuple(betas), "eps": eps}
        options = {name: given[name] for name in FORMS[form].options}
        super().__init__(
            pairs,
            FORMS[form].pairs,
            options,
            lr=lr,
            weight_decay=weight_decay,
            others=others,
            others_direction=FORMS[form].others,
            others_options=options,
        )


LoraProChoice = choice_of(LoraPro)
