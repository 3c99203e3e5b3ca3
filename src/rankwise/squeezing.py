"""squeeze: an adapter with fewer ranks, each site's where least is lost, and what is lost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankwise.adapter import Adapter
from rankwise.algebra.low_rank import LowRank
from rankwise.algebra.precision import fp32_or_finer
from rankwise.algebra.sharing import ranks_losing, ranks_within
from rankwise.approximation import Approximation
from rankwise.errors import EvidenceError, SpecError, UnsupportedAdapter
from rankwise.evidence.activations import InputCovariance
from rankwise.shapes import Float

# What a layer is fed: C = Σ x xᵀ / n, or any F [m, in] with FᵀF = C, such as inputs in rows, divided by √n.
Inputs = InputCovariance | Float[Tensor, "m in"]


@dataclass(frozen=True, eq=False)
class Squeezed(Approximation):
    """A squeezed adapter and its error.

    Its spec is still the one that the wide adapter was made with; its sites have their scales. Given inputs x, the
    errors are those of the outputs, √(Σ‖(ΔW − ΔW')x‖² / Σ‖ΔW x‖²).
    """


def squeeze(
    adapter: Adapter,
    rank: int | None = None,
    budget: int | None = None,
    error: float | None = None,
    *,
    inputs: Mapping[str, Inputs] | None = None,
) -> Squeezed:
    """The nearest adapter with fewer ranks. Exactly one of ``rank``, ``budget`` and ``error`` says how few.

    With ΔW = U S Vᵀ, from the QRs of its factors, the nearest ΔW' of rank k is U_k U_kᵀ ΔW (Eckart–Young). Given the
    covariance C of a layer's inputs, U and S are those of ΔW C^½ = s·B (A C^½), and the same ΔW' is nearest in
    E‖(ΔW − ΔW')x‖², which is what the layer's output loses (as in SVD-LLM, arXiv 2403.07378). No out × in matrix is
    formed; all is computed in fp64.

    Args:
        rank: of every site; a site that has fewer keeps them.
        budget: numbers that all pairs together may have. Each rank goes where it saves the most for its out + in
            numbers; every site keeps one.
        error: largest :attr:`Squeezed.error`, with as few numbers as it takes; every site keeps one rank.
        inputs: site → what :func:`rankwise.covariances` returned of the adapted model, or a factor F [m, in] of C.

    Raises:
        SpecError: not exactly one of the three, or one out of range. EvidenceError: ``inputs`` lacks a site.
        UnsupportedAdapter: a site's change is more than its pair (DoRA).

    >>> import torch, rankwise as rw
    >>> from rankwise.adapter import SiteAdapter
    >>> site = SiteAdapter("linear", LowRank(torch.eye(4)[:, :2] * torch.tensor([3.0, 1.0]), torch.eye(6)[:2]))
    >>> squeezed = squeeze(Adapter(rw.LoRA(rank=2), {"proj": site}, ("proj",)), rank=1)
    >>> round(squeezed.error, 4), squeezed.adapter.sites["proj"].delta.rank  # 1 of √(3² + 1²)
    (0.3162, 1)
    """
    _check_plain(adapter)
    spectra = {path: _spectrum(path, site.delta, inputs) for path, site in adapter.sites.items()}
    gains = {path: spectrum.S.square() for path, spectrum in spectra.items()}
    costs = {path: sum(site.delta.shape) for path, site in adapter.sites.items()}
    ranks = _ranks(gains, costs, rank, budget, error)
    sites = {path: replace(site, delta=spectra[path].cut(ranks[path])) for path, site in adapter.sites.items()}
    lost = {path: float(row[ranks[path] :].sum()) for path, row in gains.items()}
    whole = {path: float(row.sum()) for path, row in gains.items()}
    errors = {path: _relative(lost[path], whole[path]) for path in sites}
    return Squeezed(replace(adapter, sites=sites), errors, _relative(sum(lost.values()), sum(whole.values())))


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0


def _check_plain(adapter: Adapter) -> None:
    for path, site in adapter.sites.items():
        if site.extra:
            raise UnsupportedAdapter(
                f"{path}: has {', '.join(site.extra)} beside its pair, whose fit to the pair squeezing would spoil; "
                f"expected plain pairs, as the variants lora and adalora save them; combine it through its base first"
            )


def _ranks(
    gains: Mapping[str, Float[Tensor, " r"]],
    costs: Mapping[str, int],
    rank: int | None,
    budget: int | None,
    error: float | None,
) -> dict[str, int]:
    if [rank, budget, error].count(None) != 2:
        raise SpecError(f"squeeze: expected one of rank, budget and error, found {rank=}, {budget=}, {error=}")
    if rank is not None:
        if rank < 1:
            raise SpecError(f"squeeze: expected a rank of at least 1, found {rank}")
        return {path: min(rank, len(row)) for path, row in gains.items()}
    if budget is not None:
        least = sum(costs.values())
        if budget < least:
            raise SpecError(f"squeeze: rank 1 at all {len(costs)} sites has {least} numbers, expected budget={budget}")
        return ranks_within(gains, costs, budget)
    assert error is not None
    if not 0 <= error < 1:
        raise SpecError(f"squeeze: expected an error from 0 on and below 1, found {error}")
    return ranks_losing(gains, costs, error**2 * sum(float(row.sum()) for row in gains.values()))


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """A change ΔW, and the singular values and left vectors of ΔW C^½."""

    delta: LowRank
    U: Float[Tensor, "out k"]
    S: Float[Tensor, " k"]

    def cut(self, rank: int) -> LowRank:
        """U_k U_kᵀ ΔW with ΔW's scale, its columns of B and rows of A of equal lengths."""
        delta, scale = self.delta, self.delta.scale
        U = self.U[:, :rank]
        rows = (U.T @ delta.B.double()) @ delta.A.double()  # U_kᵀ ΔW / s
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).sqrt()
        B, A = U * lengths.T, rows / torch.where(lengths > 0, lengths, 1.0)
        dtype = fp32_or_finer(delta.B.dtype)
        return LowRank(B.to(dtype), A.to(dtype), scale)


def _spectrum(path: str, delta: LowRank, inputs: Mapping[str, Inputs] | None) -> _Spectrum:
    if inputs is not None and path not in inputs:
        raise EvidenceError(f"{path}: no inputs are given for this site; expected them for every site, or for none")
    A = delta.A.double()
    seen = A if inputs is None else _seen(A, inputs[path])
    U, S, _ = LowRank(delta.B.double(), seen, delta.scale).svd()
    most = min(delta.shape)  # an adapter may be of more columns than its layer
    return _Spectrum(delta, U[:, :most], S[:most])


def _seen(A: Float[Tensor, "r in"], inputs: Inputs) -> Float[Tensor, "r m"]:
    """A C^½, up to a rotation from the right, which changes neither U nor S."""
    if isinstance(inputs, Tensor):
        return A @ inputs.to(A).T
    values, vectors = torch.linalg.eigh(A @ inputs.matrix.to(A) @ A.T)
    seen: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return seen
