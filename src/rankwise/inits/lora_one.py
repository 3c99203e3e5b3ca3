"""LoRA-One: start with one low-rank step of full gradient descent taken."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from rankwise.errors import SpecError
from rankwise.inits.base import EvidenceNeed, GradientEvidence, Init, balanced_start
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class LoraOne(Init):
    """s·B₀A₀ = −(s/γσ₁) G_r, the best rank-r part of one full gradient step (Zhang 2025, arXiv 2502.01235).

    With −G = U S Vᵀ: B₀ = U_r √(S_r/γσ₁), A₀ = √(S_r/γσ₁) V_rᵀ, not cancelled: the step is meant to be taken, so the
    start is not the pretrained model. Division by the largest singular value σ₁ is the reference code's, for use with
    rsLoRA's s; its preconditioned optimizer is not part of the start.

    Attributes:
        gamma: γ; larger takes a smaller step.
    """

    gamma: float = 128.0

    needs: ClassVar[EvidenceNeed] = "gradients"
    keeps_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise SpecError(f"init 'lora-one': gamma must be a positive number, found {self.gamma!r}")

    def __call__(
        self, weight: Float[Tensor, "out in"], site: Site, evidence: GradientEvidence, generator: Generator
    ) -> Start:
        u, s, v = evidence.svd(site.rank)
        step = s * (site.scale / (self.gamma * s[0]))
        return balanced_start((-u.to(weight), step.to(weight), v.to(weight)), site.scale, cancel=False)
