"""AdaLoRA: ΔW = s·B diag(λ) A, its ranks shared out over the sites in training (Zhang 2023, arXiv 2303.10512).

The paper's P Λ Q is our B diag(λ) A. λ = 0 at the start, so no start pair needs an anchor. A *triplet* i of a site is
(B[:, i], λ[i], A[i]); the allocator (:mod:`rankwise.variants.rank_allocator`) sets the λ of unimportant ones to zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rankwise.algebra.low_rank import LowRank
from rankwise.errors import SpecError
from rankwise.layers.kinds import Kind
from rankwise.shapes import Bool, Float
from rankwise.sites import Site, Start
from rankwise.variants.base import PairLayer, PairVariant, TrainingHook

FACTORS = ("lora_A", "lora_B", "lora_E")


class AdaLoraLayer(PairLayer):
    """s·B diag(λ) A.

    Attributes:
        lora_E [r, 1]: λ.
        kept [r]: the triplets that the final pruning left; all of them until then.
        sensitivity, uncertainty: the allocator's running means for each factor, kept here so that the model's state is
            the whole state of a run.
        padded_rank: the rank that a saved adapter is filled up to with zeros.
    """

    kept: Tensor
    padded_rank: Tensor

    def __init__(self, site: Site, kind: Kind, dropout: float, start: Start, options: "AdaLora") -> None:
        super().__init__(site, kind, dropout, start, anchored=False)
        self.options = options
        rank = self.lora_A.shape[0]
        # A start that is meant to change the model (LoftQ's) must show from the first forward on.
        self.lora_E = nn.Parameter(self.lora_A.new_full((rank, 1), 0.0 if start.cancel else 1.0))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=self.lora_A.device))
        self.register_buffer("padded_rank", torch.tensor(0, device=self.lora_A.device))
        for name in FACTORS:
            factor = self.get_parameter(name)
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(factor))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(factor))

    @property
    def target_rank(self) -> int:
        """This site's share of the final budget, if all sites were alike."""
        return self.site.rank

    def factors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Parameter, sensitivity, uncertainty of A, B and λ."""
        return [
            (self.get_parameter(name), self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}"))
            for name in FACTORS
        ]

    def scores(self) -> Float[Tensor, " r"]:
        """The importance of each triplet: s(λ_i) + mean s(B[:, i]) + mean s(A[i]), s = sensitivity · uncertainty."""
        A, B, E = (sensitivity * uncertainty for _, sensitivity, uncertainty in self.factors())
        return E[:, 0] + B.mean(0) + A.mean(1)

    @torch.no_grad()
    def mask(self, chosen: Bool[Tensor, " r"], *, for_good: bool) -> None:
        """Set the other λ to zero; they may grow again unless it is for good."""
        self.lora_E.masked_fill_(~chosen[:, None], 0.0)
        if for_good:
            self.kept.copy_(chosen)

    def penalty(self) -> Tensor:
        """‖BᵀB − I‖²_F + ‖AAᵀ − I‖²_F: how far the triplets are from singular ones."""
        A, B = self.lora_A, self.lora_B
        eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        return (B.T @ B - eye).square().sum() + (A @ A.T - eye).square().sum()

    def scaled_B(self) -> Float[Tensor, "out r"]:
        """B diag(λ), zero in columns that were pruned for good."""
        return self.lora_B * (self.lora_E[:, 0] * self.kept)

    def delta(self) -> LowRank:
        """The triplets that are kept, then zeros up to ``padded_rank``."""
        chosen = self.kept.nonzero()[:, 0]
        B, A = self.scaled_B()[:, chosen], self.lora_A[chosen]
        missing = max(int(self.padded_rank) - len(chosen), 0)
        return LowRank(F.pad(B, (0, missing)), F.pad(A, (0, 0, 0, missing)), self.scale)

    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.kind.add(layer, x, y, self.lora_A, self.scaled_B(), self.scale, self.active_dropout)


@dataclass(frozen=True)
class AdaLora(PairVariant):
    """ΔW = s·B diag(λ) A with ranks shared out by importance.

    ``LoRA(rank=r)`` is the target: the *average* rank per site that is left in the end. Training starts with ⌈1.5 r⌉
    (at most min(out, in)), and s follows from r. With the default init, A and B are N(0, 0.02²), the paper's start;
    any other init gives its directions, and a half that it leaves at zero is drawn from N(0, 0.02²). Saved, it is the
    plain LoRA adapter B diag(λ), A of what was kept, and is read as that.

    Attributes:
        start_factor: initial rank over target rank.
        beta1, beta2: decay of the running means of sensitivity and uncertainty.
        t_initial, t_final: steps before the budget begins to shrink, and with the final ranks; below 1, a share of the
            run.
        delta_t: steps from one pruning to the next.
        orthogonal_weight: γ of the penalty γ·mean over sites of ‖BᵀB − I‖²_F + ‖AAᵀ − I‖²_F.
        padded: save all sites with one rank (zeros fill up), for engines that read no ``rank_pattern``.
    """

    saved_as_lora: ClassVar[bool] = True

    start_factor: float = 1.5
    beta1: float = 0.85
    beta2: float = 0.85
    t_initial: float = 0.1
    t_final: float = 0.3
    delta_t: int = 10
    orthogonal_weight: float = 0.5
    padded: bool = False

    def __post_init__(self) -> None:
        _check("start_factor", self.start_factor, "a number ≥ 1", self.start_factor >= 1)
        _check("beta1", self.beta1, "a number in (0, 1)", 0 < self.beta1 < 1)
        _check("beta2", self.beta2, "a number in (0, 1)", 0 < self.beta2 < 1)
        _check("t_initial", self.t_initial, "a number ≥ 0", self.t_initial >= 0)
        _check("t_final", self.t_final, "a number ≥ 0", self.t_final >= 0)
        _check("delta_t", self.delta_t, "an integer ≥ 1", type(self.delta_t) is int and self.delta_t >= 1)
        _check("orthogonal_weight", self.orthogonal_weight, "a number ≥ 0", self.orthogonal_weight >= 0)

    def starting(self, site: Site) -> Site:
        return replace(site, rank=max(site.rank, min(math.ceil(self.start_factor * site.rank), *site.shape)))

    def parameters(self, site: Site) -> int:
        return super().parameters(site) + self.starting(site).rank

    def adjusted(self, start: Start, generator: Generator, *, default: bool) -> Start:
        A, B = (_drawn(half, generator) if default or not half.any() else half for half in (start.A, start.B))
        return replace(start, A=A, B=B)

    def build(self, site: Site, kind: Kind, weight: Tensor, start: Start, dropout: float) -> AdaLoraLayer:
        return AdaLoraLayer(site, kind, dropout, start, self)

    def restore(
        self, site: Site, kind: Kind, weight: Tensor, delta: LowRank, extra: Mapping[str, Tensor]
    ) -> AdaLoraLayer:
        return AdaLoraLayer(site, kind, 0.0, Start(delta.A, delta.B, cancel=False), self)

    def training_hook(self, model: nn.Module, total_steps: int) -> TrainingHook:
        from rankwise.variants.rank_allocator import RankAllocator  # which is made of these layers

        return RankAllocator(model, total_steps)


def _drawn(like: Tensor, generator: Generator) -> Tensor:
    """N(0, 0.02²) in like's shape, from the CPU so that every device sees the same."""
    return (0.02 * torch.randn(like.shape, generator=generator)).to(like)


def _check(name: str, value: object, expected: str, fits: bool) -> None:
    if isinstance(value, bool) or not fits:  # a comparison with NaN is false
        raise SpecError(f"variant 'adalora': {name} must be {expected}, found {value!r}")
