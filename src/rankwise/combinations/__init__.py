"""Methods of combining: one change out of several of one weight. One class a method, one row in the table."""

from rankwise.methods import Method, lazy_attributes

COMBINATIONS: dict[str, Method] = {
    "exact": Method(
        ".combinations.sums:Exact", "arXiv 2106.09685", "Σ wᵢΔWᵢ, whole: the pairs side by side, of rank Σ rᵢ"
    ),
    "svd": Method(".combinations.sums:Svd", "Eckart & Young 1936", "the nearest change of a rank to Σ wᵢΔWᵢ"),
    "task-arithmetic": Method(
        ".combinations.sums:TaskArithmetic",
        "arXiv 2212.04089",
        "Σ wᵢΔWᵢ with weights of either sign: a task learned, or forgotten",
    ),
    "ties": Method(
        ".combinations.sparse:Ties",
        "arXiv 2306.01708",
        "each change's largest entries; of them, entry by entry, the mean of those that agree in sign",
    ),
    "dare": Method(
        ".combinations.sparse:Dare", "arXiv 2311.03099", "entries of each change dropped at random, the rest scaled up"
    ),
    "dare-ties": Method(
        ".combinations.sparse:DareTies", "arXiv 2311.03099", "entries dropped at random, then TIES' election of signs"
    ),
    "knots": Method(
        ".combinations.knots:Knots",
        "arXiv 2410.19735",
        "TIES in the coordinates that one SVD of all changes gives them in common",
    ),
}

__getattr__ = lazy_attributes(__name__, COMBINATIONS, {"Combination": ".combinations.base:Combination"})
