"""Site: one place that an adapter goes to. Start: the pair that its training starts from."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.shapes import Float

ADAPTED = "_rankwise"  # the plain attribute on a model that carries adapters
SLOT = "rankwise"  # the child module on an adapted layer
WHOLE = "rankwise_whole"  # the child module on a module that is trained whole


@dataclass(frozen=True)
class Site:
    """One place that an adapter goes to.

    Attributes:
        name: module path in the model.
        kind: "linear", "conv1d", "conv2d" or "embedding".
        shape: (out, in) of the weight seen as one matrix.
        rank, scale: of ΔW = scale · B A.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scale: float

    @property
    def parameters(self) -> int:
        """Trained numbers of a plain pair here: r (out + in)."""
        return self.rank * sum(self.shape)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Module path → module, as ``model.named_modules()`` has them, without what adapters have put there."""
    return dict(_base_modules(model, "", set()))


def _base_modules(module: nn.Module, path: str, visited: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module not in visited:
        visited.add(module)
        yield path, module
        for name, child in module.named_children():
            if name not in (SLOT, WHOLE):
                yield from _base_modules(child, f"{path}.{name}".removeprefix("."), visited)


def site_generator(seed: int, site_name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, site name) only, so not on order or sharding."""
    digest = hashlib.sha256(f"{seed}:{site_name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def variant_generator(seed: int, site_name: str) -> torch.Generator:
    """What a variant draws from at a site: the same when a file is read, where no init has drawn before it."""
    return site_generator(seed, f"{site_name}:variant")


@dataclass(frozen=True, eq=False)
class Start:
    """The pair (A₀, B₀) that training starts from. Where both are non-zero a frozen copy cancels it.

    Attributes:
        cancel: False where s·B₀A₀ is meant to change the model from the first forward on (LoftQ corrects a quantised
            weight with it); there is no frozen copy then.
        notes: figures about how the pair was found, by name.
    """

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    cancel: bool = True
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs_anchor(self) -> bool:
        """Whether B₀A₀ is non-zero and unwanted, so that something must cancel it."""
        return self.cancel and bool(self.A.any()) and bool(self.B.any())
