"""The algebra of low-rank matrices, and of adapters as values."""

from rankwise.methods import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {},
    {"Squeezed": ".squeezing:Squeezed", "squeeze": ".squeezing:squeeze"},
)
