"""The analyses of the LoRA paper's section 7 (Hu 2021, arXiv 2106.09685): subspace similarity and amplification."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import at_least_fp32
from rankwise.algebra.svd import truncated_svd
from rankwise.analysis.change import check_fits
from rankwise.errors import SpecError
from rankwise.shapes import Float, Int


def subspace_similarity(A1: Float[Tensor, "r1 in1"], A2: Float[Tensor, "r2 in2"]) -> Float[Tensor, "r1 r2"]:
    """φ(i, j) = ‖U₁ⁱᵀ U₂ʲ‖²_F / min(i, j) ∈ [0, 1], at [i − 1, j − 1] (the paper's equation 4).

    U₁ⁱ [in, i] holds the first i right-singular vectors of A₁, the input directions that it reads most strongly. 1
    means that the smaller of the two subspaces lies in the larger. With the Grassmann distance d² = p − Σσ² over the
    p = min(i, j) principal angles' cosines σ, φ = 1 − d²/p. (The paper's appendix G prints (1/p)(1 − d²), a slip.)

    Args:
        A1, A2: such as the ``.A`` of two pairs; of the same ``in``.

    Raises:
        SpecError: different ``in``, or a rank above it.

    >>> import torch
    >>> subspace_similarity(torch.eye(2, 4), torch.eye(3, 4))[1, 2]  # the first 2 axes lie in the first 3
    tensor(1.)
    """
    overlap, smaller = _overlap("subspace_similarity", A1, A2)
    return overlap / smaller


def grassmann_distance(A1: Float[Tensor, "r1 in1"], A2: Float[Tensor, "r2 in2"]) -> Float[Tensor, "r1 r2"]:
    """d(i, j) = √(p − Σσ²) with p = min(i, j), at [i − 1, j − 1].

    √p where the subspaces are orthogonal, 0 where one lies in the other. σ are the cosines of the p principal angles
    between the first i and the first j directions. φ = 1 − d²/p. Arguments and errors: :func:`subspace_similarity`'s.

    >>> import torch
    >>> grassmann_distance(torch.eye(1, 4), torch.eye(4)[1:2])  # two axes
    tensor([[1.]])
    """
    overlap, smaller = _overlap("grassmann_distance", A1, A2)
    return (smaller - overlap).clamp_min(0).sqrt()


def _overlap(
    what: str, A1: Float[Tensor, "r1 in1"], A2: Float[Tensor, "r2 in2"]
) -> tuple[Float[Tensor, "r1 r2"], Int[Tensor, "r1 r2"]]:
    """‖U₁ⁱᵀ U₂ʲ‖²_F and min(i, j)."""
    if A1.shape[1] != A2.shape[1] or max(A1.shape[0], A2.shape[0]) > A1.shape[1]:
        raise SpecError(
            f"{what}: expected [r1, in] and [r2, in] with the same in ≥ r1, r2, "
            f"found {list(A1.shape)} and {list(A2.shape)}"
        )
    squares = (_right_vectors(A1).T @ _right_vectors(A2)).square()
    sizes = [torch.arange(1, n + 1, device=A1.device) for n in squares.shape]
    return squares.cumsum(0).cumsum(1), torch.minimum(sizes[0][:, None], sizes[1])


def _right_vectors(A: Float[Tensor, "r in"]) -> Float[Tensor, "in r"]:
    """Right-singular vectors, strongest first, by QR of Aᵀ."""
    A = at_least_fp32(A.detach())
    q, triangle = torch.linalg.qr(A.T)
    vectors: Tensor = q @ torch.linalg.svd(triangle)[0]
    return vectors


@dataclass(frozen=True)
class Amplification:
    """How strongly a change uses directions that the weight hardly uses (the paper's table 7).

    Attributes:
        rank: k, how many singular directions were taken.
        change: ‖ΔW‖_F.
        along_change: ‖Uᵀ W V‖_F with U [out, k], V [in, k] of ΔW: what W itself does in ΔW's directions.
        along_weight: the same with W's own top k directions: the most that it can be.
        along_random: the same with k random directions.
    """

    rank: int
    change: float
    along_change: float
    along_weight: float
    along_random: float

    @property
    def factor(self) -> float:
        """‖ΔW‖_F / ‖Uᵀ W V‖_F."""
        return self.change / self.along_change if self.along_change else float("inf")


def amplification(
    delta: LowRank, weight: Float[Tensor, "out in"], rank: int | None = None, seed: int = 0
) -> Amplification:
    """How much ``delta`` amplifies its directions beyond what ``weight`` does in them.

    Works on the factors of ``delta``; of ``weight`` only products with thin matrices are formed.

    Args:
        delta: ΔW.
        weight: W₀ as one matrix.
        rank: k; by default the rank of ``delta`` (directions whose singular value is rounding are not counted).
        seed: of the random directions.

    Raises:
        SpecError: shapes that do not fit, a zero ``delta``, or k above its rank.

    >>> import torch
    >>> delta = LowRank(torch.eye(4, 1), torch.eye(1, 3), scale=6.0)
    >>> round(amplification(delta, torch.full((4, 3), 2.0)).factor, 3)
    3.0
    """
    check_fits("amplification", delta, weight)
    weight = at_least_fp32(weight.detach())
    with torch.no_grad():
        u, s, v = LowRank(delta.B.to(weight), delta.A.to(weight), delta.scale).svd()
        full = int((s > s.max() * torch.finfo(s.dtype).eps * max(delta.shape)).sum())
        k = full if rank is None else rank
        if not 0 < k <= full:
            raise SpecError(f"amplification: rank must be from 1 to that of delta, which is {full}, found {k}")
        generator = torch.Generator().manual_seed(seed)
        strongest = truncated_svd(weight, k, generator)[1]
        random_u, random_v = (torch.linalg.qr(torch.randn(n, k, generator=generator)).Q.to(weight) for n in delta.shape)
        return Amplification(
            rank=k,
            change=float(torch.linalg.vector_norm(s)),
            along_change=_projected(weight, u[:, :k], v[:, :k]),
            along_weight=float(torch.linalg.vector_norm(strongest)),
            along_random=_projected(weight, random_u, random_v),
        )


def _projected(weight: Float[Tensor, "out in"], U: Float[Tensor, "out k"], V: Float[Tensor, "in k"]) -> float:
    """‖Uᵀ W V‖_F."""
    return float(torch.linalg.matrix_norm(U.T @ (weight @ V)))
