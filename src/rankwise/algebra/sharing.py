"""Ranks shared out over sites, each further rank where it is the best bargain."""

from collections.abc import Mapping

from torch import Tensor

from rankwise.shapes import Float


def ranks_within(gains: Mapping[str, Float[Tensor, " r"]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """The ranks, at least 1 each, that gain the most for ``budget``.

    Taking always the best bargain is optimal but for what is left of the budget at the end, as each site's bargains
    only get worse.

    Args:
        gains: site → what rank 1, 2, … adds, descending; no site gets a rank beyond its end.
        costs: site → what each rank of it takes of the budget, which must pay for rank 1 everywhere.
    """
    ranks = dict.fromkeys(gains, 1)
    left = budget - sum(costs.values())
    for name in _best_first(gains, costs):
        if costs[name] <= left:
            left -= costs[name]
            ranks[name] += 1
    return ranks


def ranks_losing(gains: Mapping[str, Float[Tensor, " r"]], costs: Mapping[str, int], loss: float) -> dict[str, int]:
    """The cheapest ranks, at least 1 each, without which no more than ``loss`` of the gains is lost.

    The worst bargains are given up first. Arguments as above.
    """
    ranks = {name: max(len(row), 1) for name, row in gains.items()}
    spared = set[str]()
    lost = 0.0
    for name in reversed(_best_first(gains, costs)):
        gain = float(gains[name][ranks[name] - 1])
        if lost + gain > loss:
            spared.add(name)
        if name not in spared:
            lost += gain
            ranks[name] -= 1
    return ranks


def _best_first(gains: Mapping[str, Float[Tensor, " r"]], costs: Mapping[str, int]) -> list[str]:
    """The site of each rank after the first, by what it gains for its cost."""
    offers = [
        (-gain / costs[name], name, place) for name, row in gains.items() for place, gain in enumerate(row[1:].tolist())
    ]
    return [name for _, name, _ in sorted(offers)]
