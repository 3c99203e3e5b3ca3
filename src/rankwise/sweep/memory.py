"""How many arms fit: one base, each arm's pairs with their gradients and moments, the activations of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
USABLE = 0.8  # of the memory: what operations take for a moment, Python and the libraries need the rest


@dataclass(frozen=True)
class Memory:
    """What a sweep takes, in bytes.

    Attributes:
        base: the model without adapters.
        arms: each arm's trained numbers with their gradients and Adam's moments.
        activations: what one arm's batch keeps for the backward pass.
        available: of the device, or of the machine.
    """

    base: int
    arms: Sequence[int]
    activations: int
    available: int

    @property
    def together(self) -> int:
        """How many arms' batches a forward may hold: as many as fit, at least one."""
        room = USABLE * self.available - self.base - sum(self.arms)
        return min(len(self.arms), max(1, int(room // max(1, self.activations))))

    @property
    def fitting(self) -> int:
        """How many arms like the largest would fit, with one batch in a forward at a time."""
        room = USABLE * self.available - self.base - self.activations
        return max(0, int(room // max(self.arms)))

    def needed(self, together: int) -> int:
        """With so many arms' batches in a forward."""
        return self.base + sum(self.arms) + together * self.activations

    def described(self, together: int) -> str:
        """In a line."""
        return (
            f"Memory: {self.base / GIB:.2f} GiB for the base, {sum(self.arms) / GIB:.2f} for {len(self.arms)} arms, "
            f"{together * self.activations / GIB:.2f} for the batches of {together} in one forward: "
            f"{self.needed(together) / GIB:.2f} of {self.available / GIB:.1f} GiB. {self.fitting} such arms would fit."
        )
