"""A running low-rank factor of the gradient, at the memory of inference: G is never formed and no weight is asked.

The backward pass brings each layer's input X [t, in] and output gradient dY [t, out]. G = Σ dYᵀX over batches, so
G·Q = Σ dYᵀ(XQ) and Gᵀ·P = Σ Xᵀ(dY P) are exact and cheap. A rank-k factor U S Vᵀ of the running sum M is renewed by one
step of block power iteration a batch, started from what is known:

    Q = [V, a few fresh random directions]      P = orth(M Q)      M ≈ P (MᵀP)ᵀ, compressed to rank k again

where M Q = U S (VᵀQ) + dYᵀ(XQ) and likewise MᵀP. A second pass over the same batches, with U and V held still, gives
G V and GᵀU exactly, and from them the two-sided (generalised Nyström) approximation G V (UᵀG V)⁺ (GᵀU)ᵀ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.algebra.low_rank import LowRank
from rankwise.collection import PROBES
from rankwise.errors import EvidenceError, NonFiniteGradient
from rankwise.evidence.backward import Loss, note_idle, run_backward
from rankwise.evidence.processes import everyones, process_count, summed, total
from rankwise.evidence.undisturbed import repeatable
from rankwise.layers.increments import Increment
from rankwise.layers.kinds import kind_of
from rankwise.shapes import Float
from rankwise.sites import site_generator

FRESH = 4  # one fresh random direction for so many kept ones


@dataclass(frozen=True, eq=False)
class SketchedGradient:
    """A low-rank factor of the mean gradient of one weight.

    Attributes:
        U [out, k], S [k] descending, V [in, k]: G ≈ U diag(S) Vᵀ.
        missed: an estimate of ‖G − U S Vᵀ‖²_F from random probes.
    """

    U: Float[Tensor, "out k"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "in k"]
    missed: float

    @property
    def energy(self) -> float:
        """‖G‖²_F, estimated."""
        return float(self.S.double().square().sum()) + self.missed

    @property
    def captured(self) -> float:
        """Share of ‖G‖²_F in the factor, estimated, in [0, 1]."""
        return 1.0 - self.missed / self.energy

    def svd(self, k: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in k"]]:
        """The k leading triplets.

        Raises:
            EvidenceError: k is more than the factor holds.
        """
        if k > len(self.S):
            raise EvidenceError(
                f"this sketch holds {len(self.S)} directions, expected at least {k} (LoRA-GA at rank r needs 2r); "
                f"collect again with a larger rank"
            )
        return self.U[:, :k], self.S[:k], self.V[:, :k]


def _gram_svd(tall: Float[Tensor, "n q"], count: int) -> tuple[Float[Tensor, "q c"], Float[Tensor, " c"]]:
    """W/S and S of the leading singular triplets of a tall matrix U S Wᵀ, so that tall @ (W/S) = U; c ≤ count.

    From the eigenvectors of the q × q Gram matrix in fp64, several times faster than a QR of the tall one; directions
    that fp32's rounding would turn towards the large ones (S below 3e-5 of the largest: 1e-9 of its energy) are left
    out.
    """
    wide = tall.double()
    squares, w = torch.linalg.eigh(wide.T @ wide)
    squares, w = squares.flip(0)[:count], w.flip(1)[:, :count]
    kept = squares > squares[0] * 1e-9
    s = squares[kept].sqrt()
    return (w[:, kept] / s).to(tall.dtype), s.to(tall.dtype)


class _Running:
    """One layer's factor while batches come in."""

    def __init__(self, shape: tuple[int, int], width: int, generator: torch.Generator, device: torch.device) -> None:
        out, into = shape
        self.width = min(width, out, into)
        self.generator = generator
        self.U = torch.zeros(out, 0, device=device)
        self.S = torch.zeros(0, device=device)
        self.V = torch.zeros(into, 0, device=device)
        self.probe = self._random(into, PROBES)
        self.probed = torch.zeros(out, PROBES, device=device)

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self.generator).to(self.V.device)

    def add(self, increment: Increment) -> None:
        """M ← U S Vᵀ + increment, compressed to ``width`` directions by one block power step."""
        missing = self.width - self.V.shape[1]  # all, at first
        fresh = self._random(self.V.shape[0], missing + max(self.width // FRESH, 1))
        seen = increment.times(torch.cat([self.V, fresh, self.probe], 1))
        known = self.V.shape[1] + fresh.shape[1]
        self.probed += seen[:, known:]
        image = seen[:, :known] + (self.U * self.S) @ (self.V.T @ torch.cat([self.V, fresh], 1))
        basis, _ = _gram_svd(image, image.shape[1])
        P = image @ basis
        Z = increment.transposed_times(P) + (self.V * self.S) @ (self.U.T @ P)
        turn, self.S = _gram_svd(Z, self.width)  # Z = V S Wᵀ with Z @ turn = V, so M ≈ P Zᵀ = (P W) S Vᵀ
        self.U, self.V = P @ (turn * self.S), Z @ turn

    def join(self) -> None:
        """Make it the factor of the sum over all processes: their factors side by side, compressed again."""
        if process_count() == 1:
            return
        parts = everyones(((self.U * self.S).cpu(), self.V.cpu()))
        images, V = (torch.cat(halves, 1).to(self.V.device) for halves in zip(*parts, strict=True))
        U, S, V = LowRank(images, V.T).svd()
        kept = int((S[: self.width] > S[0] * 1e-6).sum())  # zero columns leave rounding behind
        self.U, self.S, self.V = U[:, :kept], S[:kept], V[:, :kept]
        self.probed = summed(self.probed)

    def result(self, count: int) -> SketchedGradient:
        """The factor of the mean over ``count`` batches."""
        residual = self.probed - (self.U * self.S) @ (self.V.T @ self.probe)
        missed = float(residual.double().square().sum()) / PROBES / count**2
        return SketchedGradient(self.U, self.S / count, self.V, missed)


class _Fixed:
    """The second pass: products of G with a first factor's U and V, exactly."""

    def __init__(self, first: _Running) -> None:
        self.first = first
        self.right = torch.zeros_like(first.U)  # G V
        self.left = torch.zeros_like(first.V)  # GᵀU

    def add(self, increment: Increment) -> None:
        self.right += increment.times(self.first.V)
        self.left += increment.transposed_times(self.first.U)

    def join(self) -> None:
        """Make them the products over all processes."""
        self.right, self.left = summed(self.right), summed(self.left)

    def result(self, count: int) -> SketchedGradient:
        """G V (UᵀG V)⁺ (GᵀU)ᵀ / count, as U S Vᵀ."""
        core = self.first.U.T @ self.right
        u, s, vh = torch.linalg.svd(core.double())
        kept = s > s[0] * 1e-6  # below this the core holds rounding only
        half = s[kept].rsqrt()
        B = self.right @ (vh[kept].T * half).float()
        A = (u[:, kept] * half).T.float() @ self.left.T
        first = self.first
        first.U, first.S, first.V = LowRank(B, A).svd()
        return first.result(count)


class _Factors:
    """The factors of several layers while batches come in."""

    def __init__(self, layers: Mapping[str, nn.Module], widths: Mapping[str, int]) -> None:
        self.layers, self.widths = dict(layers), widths
        self.factors: dict[str, _Running | _Fixed] = {}

    def add(self, name: str, layer: nn.Module, x: Tensor, grad_y: Tensor) -> None:
        extent = torch.stack(torch.aminmax(grad_y))  # one pass, and NaN comes through
        if not bool(torch.isfinite(extent).all()):
            raise NonFiniteGradient(f"{name}: the gradient of its output holds NaN or infinity; look at the batches")
        if not bool(extent.any()):
            return
        if name not in self.factors:
            self.factors[name] = self._begin(name, grad_y.device)
        self.factors[name].add(kind_of(layer).increment(layer, x, grad_y))

    def _begin(self, name: str, device: torch.device) -> _Running:
        layer = self.layers[name]
        return _Running(kind_of(layer).shape(layer), self.widths[name], site_generator(0, name), device)

    def join(self, idle: list[str] | None) -> None:
        """Make them the factors of the sums over all processes, without the layers that no gradient reached.

        Raises:
            NoGradient: a layer got none, in any process.
        """
        for name in list(self.layers):
            if not total(int(name in self.factors)):
                note_idle(name, idle)
                del self.layers[name]
                continue
            if name not in self.factors:  # other processes have seen it
                self.factors[name] = self._begin(name, torch.device("cpu"))
            self.factors[name].join()

    def hold_still(self) -> None:
        """From here on, products with the factors as they are."""
        self.factors = {name: _Fixed(factor) for name, factor in self.factors.items() if isinstance(factor, _Running)}


def sketched_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    widths: Mapping[str, int],
    loss: Loss | None = None,
    *,
    sweeps: int = 1,
    idle: list[str] | None = None,
) -> dict[str, SketchedGradient]:
    """A factor of each layer's mean gradient over the batches.

    Args:
        widths: site → k, the directions kept; four times the adapter's rank serves LoRA-GA.
        sweeps: 2 goes over the same batches again for a closer factor.
        idle: see :func:`rankwise.evidence.exact_gradients`.

    Raises:
        EvidenceError: see :func:`rankwise.gradients`.
    """
    batches = repeatable(batches, sweeps)
    running = _Factors(layers, widths)
    count = run_backward(model, layers, batches, loss, running.add)
    running.join(idle)
    for _ in range(sweeps - 1):
        running.hold_still()
        run_backward(model, layers, batches, loss, running.add)
        running.join(None)
    return {name: running.factors[name].result(count) for name in running.layers}
