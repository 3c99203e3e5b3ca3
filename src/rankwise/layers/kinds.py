"""The kinds of layer that carry an adapter, each with its weight seen as one matrix [out, in].

Everything else in the library works on that matrix: a Conv1D's and an Embedding's weight is transposed, a Conv2d's is
flattened to [out, in·kh·kw]. ``lora_A`` is [r, in] and ``lora_B`` [out, r] for all of them.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.algebra.precision import at_least_fp32, fp32_or_finer
from rankwise.errors import EvidenceError, TargetError
from rankwise.in_place import is_transformed, writable
from rankwise.layers.increments import Dense, Increment, Outer
from rankwise.layers.low_rank_product import add_low_rank, as_rows, plain_sum
from rankwise.layers.quantised import dequantised
from rankwise.shapes import Float, Shaped


class Kind(ABC):
    """How a kind of layer stores its weight and how a low-rank term is added to its output. Stateless."""

    name: ClassVar[str]
    output_axis: ClassVar[int] = -1  # where the layer's output has its ``out`` axis, from the end

    @abstractmethod
    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """(out, in) of the weight as one matrix."""

    @abstractmethod
    def matrix(self, layer: Any, stored: Tensor) -> Shaped[Tensor, "out in"]:
        """A tensor in the layout of ``layer.weight`` as one matrix: a view."""

    def weight(self, layer: Any) -> Shaped[Tensor, "out in"]:
        """The weight as one matrix: a view, or dequantised."""
        return self.matrix(layer, dequantised(layer))

    @abstractmethod
    def stored(self, layer: Any, matrix: Shaped[Tensor, "out in"]) -> Tensor:
        """A matrix [out, in] in the layout of ``layer.weight``; the inverse of :meth:`matrix`: a view."""

    @abstractmethod
    def add(
        self,
        layer: Any,
        x: Tensor,
        y: Tensor,
        A: Float[Tensor, "r in"],
        B: Float[Tensor, "out r"],
        scale: float,
        dropout: float,
    ) -> Tensor:
        """y + scale · B A applied to dropout(x); may write into y where only the caller's forward hook can hold it."""

    @abstractmethod
    def gradient(self, layer: Any, x: Tensor, grad_y: Tensor) -> Float[Tensor, "out in"]:
        """dL/dW as one matrix from the layer's input and the gradient of its output, in fp32 or finer."""

    def increment(self, layer: Any, x: Tensor, grad_y: Tensor) -> Increment:
        """:meth:`gradient` by its products."""
        return Dense(self.gradient(layer, x, grad_y))

    @abstractmethod
    def inputs(self, layer: Any, x: Tensor) -> Float[Tensor, "n in"]:
        """The vectors that the matrix [out, in] multiplies, one a row; of a convolution, every patch of every group.

        Raises:
            EvidenceError: the layer has no input vectors (an embedding looks ids up).
        """

    def project(self, layer: Any, A: Float[Tensor, "r in"]) -> Float[Tensor, "out r"]:
        """W Aᵀ, in A's dtype."""
        weight = self.weight(layer)
        return (weight @ A.to(weight.dtype).T).to(A.dtype)

    def bias(self, layer: Any) -> Tensor | None:
        """What the layer adds to W x, [out]."""
        return layer.bias  # type: ignore[no-any-return]

    def kernel(self, layer: Any) -> tuple[int, ...]:
        """The axes that ``in`` unfolds to: () for a matrix, (in/groups, kh, kw) for a convolution."""
        return ()

    def groups(self, layer: Any) -> int:
        """How many independent groups of channels share A."""
        return 1


class _MatmulKind(Kind):
    """Layers that compute x Wᵀ + b on the last axis."""

    def add(self, layer: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
        if y.is_nested or is_transformed():
            return plain_sum(y, x, A, B, scale, dropout)
        return add_low_rank(writable(layer, y), x, A, B, scale, dropout)

    def gradient(self, layer: Any, x: Tensor, grad_y: Tensor) -> Tensor:
        dtype = fp32_or_finer(grad_y.dtype)
        return as_rows(grad_y).to(dtype).T @ as_rows(x).to(dtype)

    def increment(self, layer: Any, x: Tensor, grad_y: Tensor) -> Increment:
        return Outer(as_rows(x), as_rows(grad_y))

    def inputs(self, layer: Any, x: Tensor) -> Tensor:
        return as_rows(x)


class LinearKind(_MatmulKind):
    """torch.nn.Linear and its quantised subclasses; weight [out, in]."""

    name = "linear"

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    def matrix(self, layer: Any, stored: Tensor) -> Tensor:
        return stored

    def stored(self, layer: Any, matrix: Tensor) -> Tensor:
        return matrix


class _TransposedKind(Kind):
    """The weight is stored [in, out]."""

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]

    def matrix(self, layer: Any, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, layer: Any, matrix: Tensor) -> Tensor:
        return matrix.T


class Conv1DKind(_TransposedKind, _MatmulKind):
    """transformers' Conv1D (GPT-2): a linear layer with its weight stored [in, out]."""

    name = "conv1d"


class EmbeddingKind(_TransposedKind):
    """torch.nn.Embedding: weight [vocab, dim] is the transpose of the matrix [dim, vocab] that acts on one-hot ids."""

    name = "embedding"

    def add(self, layer: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
        # Ids have no elements to drop, so dropout does not apply.
        h = F.embedding(x, A.T.to(y.dtype), padding_idx=layer.padding_idx)  # whose row is not trained
        term: Tensor = F.linear(h, B.to(y.dtype)) * (scale * self.output_scale(layer))
        return y + term

    def gradient(self, layer: Any, x: Tensor, grad_y: Tensor) -> Tensor:
        dtype = fp32_or_finer(grad_y.dtype)
        rows = torch.zeros(layer.num_embeddings, layer.embedding_dim, dtype=dtype, device=grad_y.device)
        rows.index_add_(0, x.flatten(), as_rows(grad_y).to(dtype))
        if layer.padding_idx is not None:
            rows[layer.padding_idx] = 0.0
        scaled: Tensor = rows.mul_(self.output_scale(layer))
        return scaled.T

    def inputs(self, layer: Any, x: Tensor) -> Tensor:
        raise EvidenceError("an embedding's inputs are ids, not vectors; exclude it")

    def bias(self, layer: Any) -> Tensor | None:
        return None

    @staticmethod
    def output_scale(layer: Any) -> Any:
        """Gemma's embeddings multiply what they look up; the low-rank term must be multiplied too."""
        return getattr(layer, "embed_scale", 1.0)


class Conv2dKind(Kind):
    """torch.nn.Conv2d; weight [out, in/groups, kh, kw] seen as [out, in/groups·kh·kw].

    With groups, every group has the same A and its own rows of B, so that ΔW is again a grouped convolution.
    """

    name = "conv2d"
    output_axis = -3

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.weight.shape[0], layer.weight[0].numel()

    def matrix(self, layer: Any, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, layer: Any, matrix: Tensor) -> Tensor:
        return matrix.view(layer.weight.shape)

    def add(self, layer: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
        x = F.dropout(x.to(y.dtype), dropout)
        return y + scale * self._up(layer, self._down(layer, x, A.to(y.dtype)), B.to(y.dtype))

    def _down(self, layer: Any, x: Tensor, A: Tensor) -> Tensor:
        """[n, in, h, w] → [n, groups·r, h', w']."""
        kernel = A.reshape(-1, *layer.weight.shape[1:])
        padding = 0
        if layer.padding_mode == "zeros":
            padding = layer.padding
        else:  # reflect, replicate, circular: pad as the layer itself does
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        batched = x if x.dim() == 4 else x[None]
        count = int(layer.groups)
        every_group = batched.reshape(-1, batched.shape[1] // count, *batched.shape[2:])  # through the same A
        h = F.conv2d(every_group, kernel, None, layer.stride, padding, layer.dilation)
        h = h.reshape(-1, count * h.shape[1], *h.shape[2:])
        return h if x.dim() == 4 else h[0]

    def _up(self, layer: Any, h: Tensor, B: Tensor) -> Tensor:
        return F.conv2d(h, B[:, :, None, None], groups=int(layer.groups))

    def gradient(self, layer: Any, x: Tensor, grad_y: Tensor) -> Tensor:
        dtype = fp32_or_finer(grad_y.dtype)
        zero = torch.zeros(layer.weight.shape, dtype=dtype, device=x.device, requires_grad=True)
        with torch.enable_grad():
            y = layer._conv_forward(x.detach().to(dtype), zero, None)
        (grad,) = torch.autograd.grad(y, zero, grad_y.to(dtype))
        return grad.flatten(1)

    def inputs(self, layer: Any, x: Tensor) -> Tensor:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x if x.dim() == 4 else x[None], layer._reversed_padding_repeated_twice, mode=mode)
        every_group = padded.reshape(-1, padded.shape[1] // int(layer.groups), *padded.shape[2:])
        patches = F.unfold(every_group, layer.kernel_size, layer.dilation, 0, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)

    def kernel(self, layer: Any) -> tuple[int, ...]:
        return tuple(layer.weight.shape[1:])

    def groups(self, layer: Any) -> int:
        return int(layer.groups)


LINEAR, CONV1D, EMBEDDING, CONV2D = LinearKind(), Conv1DKind(), EmbeddingKind(), Conv2dKind()
KINDS: dict[str, Kind] = {kind.name: kind for kind in (LINEAR, CONV1D, EMBEDDING, CONV2D)}


def kind_of(layer: nn.Module) -> Kind:
    """The kind of a layer that can carry an adapter.

    Raises:
        TargetError: it is of no such kind.
    """
    kind = kind_or_none(layer)
    if kind is None:
        raise TargetError(
            f"a {type(layer).__name__} cannot carry an adapter; expected Linear, Conv1D, Conv2d or Embedding: name "
            f"layers inside it"
        )
    return kind


def kind_or_none(layer: nn.Module) -> Kind | None:
    """The kind of a layer, or None where no adapter can go."""
    if isinstance(layer, nn.Linear):
        return LINEAR
    if isinstance(layer, nn.Embedding):
        return EMBEDDING
    if isinstance(layer, nn.Conv2d):  # one with a forward of its own may do anything with its weight
        return CONV2D if type(layer).forward is nn.Conv2d.forward else None
    if ("transformers.pytorch_utils", "Conv1D") in {(c.__module__, c.__name__) for c in type(layer).__mro__}:
        return CONV1D  # by name: the core does not import transformers
    return None


def base_matrix(layer: Any) -> Float[Tensor, "out in"]:
    """The layer's weight as one matrix [out, in], dequantised, in fp32 or finer (a view where it already is)."""
    return at_least_fp32(kind_of(layer).weight(layer))
