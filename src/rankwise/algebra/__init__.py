"""The algebra of low-rank matrices, and of adapters as values."""

from rankwise.methods import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {},
    {
        "Approximation": ".approximation:Approximation",
        "Squeezed": ".squeezing:Squeezed",
        "combine": ".combining:combine",
        "convert": ".converting:convert",
        "extract": ".extracting:extract",
        "renamed": ".renaming:renamed",
        "squeeze": ".squeezing:squeeze",
    },
)
