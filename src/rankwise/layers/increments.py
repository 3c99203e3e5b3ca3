"""What one backward pass adds to a layer's weight gradient, by its products with thin matrices."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from rankwise.shapes import Float


class Increment(ABC):
    """What one backward pass through a layer adds to its weight gradient, [out, in], by its products only."""

    @abstractmethod
    def times(self, Q: Float[Tensor, "in q"]) -> Float[Tensor, "out q"]:
        """G Q, in Q's dtype."""

    @abstractmethod
    def transposed_times(self, P: Float[Tensor, "out q"]) -> Float[Tensor, "in q"]:
        """Gᵀ P, in P's dtype."""


@dataclass(frozen=True, eq=False)
class Outer(Increment):
    """dYᵀX for inputs X [t, in] and output gradients dY [t, out]; never formed."""

    x: Float[Tensor, "t in"]
    grad_y: Float[Tensor, "t out"]

    def times(self, Q: Tensor) -> Tensor:
        return (self.grad_y.T @ (self.x @ Q.to(self.x.dtype)).to(self.grad_y.dtype)).to(Q.dtype)

    def transposed_times(self, P: Tensor) -> Tensor:
        return (self.x.T @ (self.grad_y @ P.to(self.grad_y.dtype)).to(self.x.dtype)).to(P.dtype)


@dataclass(frozen=True, eq=False)
class Dense(Increment):
    """The gradient itself, where the layer gives no cheaper form."""

    matrix: Float[Tensor, "out in"]

    def times(self, Q: Tensor) -> Tensor:
        return self.matrix @ Q.to(self.matrix.dtype)

    def transposed_times(self, P: Tensor) -> Tensor:
        return self.matrix.T @ P.to(self.matrix.dtype)
