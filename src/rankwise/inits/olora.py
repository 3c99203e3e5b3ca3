"""OLoRA: start from the QR decomposition of the weight."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rankwise.inits.base import Init
from rankwise.shapes import Float
from rankwise.sites import Site, Start


@dataclass(frozen=True)
class Olora(Init):
    """B₀ = Q[:, :r], A₀ = R[:r] with W = QR (Büyükakyüz 2024, arXiv 2406.01775)."""

    def __call__(self, weight: Float[Tensor, "out in"], site: Site, evidence: None, generator: Generator) -> Start:
        # The first r columns of Q and rows of R come from the first r columns of W alone; Qᵀ W gives those rows.
        q = torch.linalg.qr(weight[:, : site.rank]).Q
        return Start(q.T @ weight, q)
