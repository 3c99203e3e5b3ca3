"""The algebra of low-rank matrices: ``LowRank(B, A, scale)`` stands for ``scale · B A`` and never forms it unasked."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.algebra.precision import fp32_or_finer
from rankwise.shapes import Float


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``scale · B A`` of shape [out, in], held by its factors.

    Everything but :meth:`dense` works on the factors (QR), so nothing of size out × in is allocated.

    >>> import torch
    >>> delta = LowRank(torch.ones(3, 1), torch.ones(1, 2), scale=2.0)
    >>> delta.dense().shape, round(float(delta.norm()), 4)
    (torch.Size([3, 2]), 4.899)
    """

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r in"]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of B, an upper bound on the rank of the matrix."""
        return self.A.shape[0]

    @property
    def T(self) -> "LowRank":
        """The transpose, [in, out]."""
        return LowRank(self.A.T, self.B.T, self.scale)

    def rows(self, chosen: slice) -> "LowRank":
        """The matrix's chosen rows, [n, in]."""
        return LowRank(self.B[chosen], self.A, self.scale)

    def dense(self) -> Float[Tensor, "out in"]:
        """scale · B A."""
        return (self.B * self.scale) @ self.A

    def apply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """scale · x Aᵀ Bᵀ, the layer's view of the matrix."""
        return (x @ self.A.T) @ self.B.T * self.scale

    def __neg__(self) -> "LowRank":
        return LowRank(self.B, self.A, -self.scale)

    def __mul__(self, factor: float) -> "LowRank":
        return LowRank(self.B, self.A, self.scale * factor)

    __rmul__ = __mul__

    def __add__(self, other: "LowRank") -> "LowRank":
        """The exact sum, of rank r₁ + r₂; B carries the ratio of the scales."""
        if self.scale == 0.0:
            return LowRank(torch.cat([0.0 * self.B, other.B], 1), torch.cat([self.A, other.A]), other.scale)
        ratio = other.scale / self.scale
        return LowRank(torch.cat([self.B, ratio * other.B], 1), torch.cat([self.A, other.A]), self.scale)

    def __sub__(self, other: "LowRank") -> "LowRank":
        return self + (-other)

    def inner(self, other: "LowRank") -> Tensor:
        """Frobenius inner product: s₁s₂ Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), a scalar tensor."""
        return self.scale * other.scale * ((self.B.T @ other.B) * (self.A @ other.A.T)).sum()

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q_B, the small core, Q_A with scale · B A = Q_B core Q_Aᵀ, in fp32 or finer."""
        dtype = fp32_or_finer(self.B.dtype)  # QR is not there in half precision
        q_b, r_b = torch.linalg.qr(self.B.to(dtype))
        q_a, r_a = torch.linalg.qr(self.A.T.to(dtype))
        return q_b, self.scale * (r_b @ r_a.T), q_a

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar tensor; from the QR core, so near-cancelling sums keep their digits."""
        norm: Tensor = torch.linalg.matrix_norm(self._core()[1])
        return norm

    def svd(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
        """Thin SVD: U [out, k], S [k] descending, V [in, k], with the matrix = U diag(S) Vᵀ and k ≤ r."""
        q_b, core, q_a = self._core()
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        return q_b @ u, s, q_a @ vh.T

    def truncate(self, rank: int) -> "LowRank":
        """The best approximation of this rank (Eckart–Young), singular values split evenly over B and A."""
        u, s, v = self.svd()
        root = s[:rank].sqrt()
        return LowRank(u[:, :rank] * root, (v[:, :rank] * root).T)


def difference(
    B: Float[Tensor, "out r"],
    A: Float[Tensor, "r in"],
    start_B: Float[Tensor, "out r"],
    start_A: Float[Tensor, "r in"],
    scale: float,
) -> LowRank:
    """s(BA − B₀A₀) from B = B₀ + δB and A = A₀ + δA, given as (δB, δA, B₀, A₀).

    Computed as s(δB·A + B₀·δA) = s [δB, B₀][A; δA], so that no two large products cancel. Rank 2r.
    """
    return LowRank(torch.cat([B, start_B], 1), torch.cat([start_A + A, A]), scale)


def captured(singular_values: Float[Tensor, " k"], total_energy: float) -> float:
    """Share of ‖G‖²_F that these singular directions hold, in [0, 1]."""
    if total_energy == 0.0 or math.isnan(total_energy):
        return 0.0
    return float(singular_values.double().square().sum()) / total_energy
