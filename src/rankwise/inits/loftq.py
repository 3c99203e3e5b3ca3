"""LoftQ: start from what quantisation lost."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from rankwise.algebra.svd import truncated_svd
from rankwise.errors import EvidenceError
from rankwise.inits.base import EvidenceNeed, Init, balanced_start
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Loftq(Init):
    """s·B₀A₀ = the best rank-r approximation of W − Q(W), not cancelled (Li 2023, arXiv 2310.08659).

    The start is closer to the full-precision model than the quantised base is; that is its purpose. The paper
    alternates this step with quantising W − s·B₀A₀ anew; here the base is fixed and never touched, and for a fixed
    Q(W) the truncated SVD is the minimiser of ‖W − Q(W) − s·BA‖_F (Eckart–Young), so one step is all there is.

    Attributes:
        reference: the full-precision weights: a safetensors file, or a directory with model.safetensors or its index.
            Or leave it out and pass ``evidence=rankwise.weights(full_precision_model)`` to ``attach``.
    """

    reference: str | None = None

    needs: ClassVar[EvidenceNeed] = "weights"
    keeps_function: ClassVar[bool] = False

    def __call__(
        self, weight: Float[Tensor, "out in"], site: Site, evidence: Float[Tensor, "out in"], generator: Generator
    ) -> Start:
        lost = evidence.to(weight) - weight
        if not bool(lost.any()):
            raise EvidenceError(
                f"{site.name}: init 'loftq' starts from what quantisation lost, and this weight equals its reference; "
                f"load the base quantised, or choose another init"
            )
        return balanced_start(truncated_svd(lost, site.rank, generator), site.scale, cancel=False)
