"""Which rank, layer by layer, from the gradient's spectrum: what a LoRA-GA start of each rank captures of a full step.

At rank r the start takes the 2r leading singular directions of G, and its first SGD step is full fine-tuning's
projection on them: a share Σ_{i≤2r} σ_i² / ‖G‖² of the step's energy.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rankwise.algebra.sharing import ranks_within
from rankwise.errors import EvidenceError
from rankwise.inits.base import GradientEvidence
from rankwise.shapes import Float


@dataclass(frozen=True, eq=False)
class StepSpectrum:
    """What each rank more captures of one layer's gradient.

    Attributes:
        gains: σ²_{2r−1} + σ²_{2r} for r = 1, 2, …, fp64.
        energy: ‖G‖²_F.
    """

    gains: Float[Tensor, " r"]
    energy: float

    @property
    def shares(self) -> Float[Tensor, " r"]:
        """Share of the energy that rank 1, 2, … captures."""
        return self.gains.cumsum(0) / self.energy


def step_spectrum(evidence: GradientEvidence, largest_rank: int) -> StepSpectrum:
    """The spectrum of a gradient by pairs of directions, for ranks up to ``largest_rank``.

    Raises:
        EvidenceError: a sketch that holds fewer than 2 · largest_rank directions.
    """
    _, s, _ = evidence.svd(2 * largest_rank)
    return StepSpectrum(s.double().square().cpu().view(-1, 2).sum(1), evidence.energy)


@dataclass(frozen=True, eq=False)
class RankAdvice:
    """Ranks within a parameter budget.

    Attributes:
        ranks: site → rank.
        parameters: how many trained numbers they take.
        captured: Σ over sites of the energy that they capture / Σ‖G‖².
        captured_by_equal_rank: the same for one rank everywhere, the largest within the budget.
        equal_rank: that rank.
    """

    ranks: Mapping[str, int]
    parameters: int
    captured: float
    equal_rank: int
    captured_by_equal_rank: float


def advise_ranks(spectra: Mapping[str, StepSpectrum], shapes: Mapping[str, tuple[int, int]], budget: int) -> RankAdvice:
    """The ranks, at least 1 each, that capture the most energy of the first step with ``budget`` trained parameters.

    One rank more at a site captures σ²_{2r+1} + σ²_{2r+2} for out + in parameters.

    Args:
        spectra: site → :func:`step_spectrum`; no site gets a rank beyond its end.
        shapes: site → (out, in).

    Raises:
        EvidenceError: rank 1 everywhere exceeds the budget already.
    """
    costs = {name: sum(shapes[name]) for name in spectra}
    least = sum(costs.values())
    if least > budget:
        raise EvidenceError(f"rank 1 in all {len(costs)} layers takes {least} parameters, expected at most {budget}")
    ranks = ranks_within({name: spectrum.gains for name, spectrum in spectra.items()}, costs, budget)
    spent = sum(rank * costs[name] for name, rank in ranks.items())
    equal = min(max(budget // least, 1), max(len(spectrum.gains) for spectrum in spectra.values()))
    return RankAdvice(ranks, spent, _captured(spectra, ranks), equal, _captured(spectra, dict.fromkeys(spectra, equal)))


def _captured(spectra: Mapping[str, StepSpectrum], ranks: Mapping[str, int]) -> float:
    """Share of all layers' energy."""
    kept = sum(float(spectra[name].gains[:rank].sum()) for name, rank in ranks.items())
    return kept / sum(spectrum.energy for spectrum in spectra.values())
