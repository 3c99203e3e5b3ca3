"""Rank advice: the best ranks within a budget, found by trying all of them on a small case."""

import itertools

import pytest
import torch

import rankwise as rw
from rankwise.analysis import advise_ranks, step_spectrum

SHAPES = {"small": (8, 6), "wide": (10, 30), "flat": (12, 12)}


def spectra() -> dict[str, rw.analysis.StepSpectrum]:
    generator = torch.Generator().manual_seed(0)
    matrices = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    matrices["small"] *= 3
    return {name: step_spectrum(rw.evidence.ExactGradient(G), 3) for name, G in matrices.items()}


def test_shares_are_those_of_the_leading_directions() -> None:
    G = torch.randn(9, 7, generator=torch.Generator().manual_seed(1))
    s = torch.linalg.svdvals(G.double())
    expected = [float(s[: 2 * r].square().sum() / s.square().sum()) for r in (1, 2, 3)]
    assert step_spectrum(rw.evidence.ExactGradient(G), 3).shares.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("budget", [78, 92, 110, 140, 180, 234, 1000])
def test_no_other_ranks_within_the_budget_capture_more(budget: int) -> None:
    found = spectra()
    advice = advise_ranks(found, SHAPES, budget)
    costs = {name: sum(shape) for name, shape in SHAPES.items()}
    assert advice.parameters == sum(costs[name] * rank for name, rank in advice.ranks.items()) <= budget

    def captured(ranks: tuple[int, ...]) -> float:
        kept = sum(float(found[name].gains[:rank].sum()) for name, rank in zip(SHAPES, ranks, strict=True))
        return kept / sum(each.energy for each in found.values())

    affordable = [
        ranks
        for ranks in itertools.product((1, 2, 3), repeat=3)
        if sum(costs[name] * rank for name, rank in zip(SHAPES, ranks, strict=True)) <= advice.parameters
    ]
    assert advice.captured == pytest.approx(captured(tuple(advice.ranks.values())))
    assert advice.captured == pytest.approx(max(map(captured, affordable)))
    assert advice.captured >= advice.captured_by_equal_rank - 1e-12 or advice.equal_rank * 78 > budget


def test_a_budget_below_rank_one_is_refused() -> None:
    with pytest.raises(
        rw.errors.EvidenceError, match="rank 1 in all 3 layers takes 78 parameters, expected at most 77"
    ):
        advise_ranks(spectra(), SHAPES, 77)
