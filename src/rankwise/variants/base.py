"""What a variant is: an options object that builds one site's adapter layer, and owns its exceptions.

It says which tensors train, how they are written to a file and read again, and what it does in a training loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from rankwise.algebra.low_rank import LowRank
from rankwise.errors import SpecError
from rankwise.layers.kinds import Kind
from rankwise.shapes import Float
from rankwise.sites import Site, Start

ALL = slice(None)


class AdapterLayer(nn.Module, ABC):
    """One adapter at one site: ``adapt`` puts it on the frozen layer's output.

    Attributes:
        frozen: names of parameters that are never trained.
    """

    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(self, site: Site, kind: Kind, dropout: float) -> None:
        super().__init__()
        self.site = site
        self.kind = kind
        self.dropout = dropout

    @property
    def active_dropout(self) -> float:
        """The probability in force now: 0 outside training."""
        return self.dropout if self.training else 0.0

    def requires_grad_(self, requires_grad: bool = True) -> "AdapterLayer":
        """Train the parameters that are to be trained, or none."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.frozen)
        return self

    @abstractmethod
    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, from the layer's input x and its own output y (which may be written into)."""


class WeightChange(AdapterLayer):
    """An adapter that is a change of the weight: ``fold`` defines what ``adapt`` means.

    Law: adapt(layer, x, layer(x)) is what the layer with weight fold(W₀) makes of x.

    Attributes:
        additive: whether several adapters' changes add up.
    """

    additive: ClassVar[bool] = True

    @abstractmethod
    def change(self, weight: Float[Tensor, "n in"], rows: slice = ALL) -> Float[Tensor, "n in"]:
        """What the adapter adds to the weight W₀, dense, in W₀'s dtype.

        Args:
            weight: W₀, or those of its rows that ``rows`` names: no change of one row looks at another.
        """

    def fold(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weight that alone does what layer and adapter do together; a new tensor."""
        return weight + self.change(weight)


class FoldableLayer(WeightChange):
    """A change of the weight that is low-rank but for what the variant does to it beside."""

    @property
    def scale(self) -> float:
        """s of ΔW = s(BA − B₀A₀)."""
        return self.site.scale

    @abstractmethod
    def delta(self) -> LowRank:
        """The low-rank change s(BA − B₀A₀); what else the variant does to the weight is in :meth:`change`."""

    def change(self, weight: Float[Tensor, "n in"], rows: slice = ALL) -> Float[Tensor, "n in"]:
        return self.delta().rows(rows).dense().to(weight.dtype)

    def start_to_fold(self) -> LowRank | None:
        """What must be taken off the base weight for this layer to be right; None where the base stays as it is."""
        return None

    def extra_tensors(self) -> dict[str, Tensor]:
        """What an adapter file holds for this site beside the pair, by the file's suffix."""
        return {}

    def extra_repr(self) -> str:
        out, into = self.site.shape
        return f"{self.site.kind} {out}×{into}, rank={self.site.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class PairLayer(FoldableLayer):
    """An adapter layer with a trained pair, and the frozen start that cancels it where both halves are non-zero.

    Attributes:
        lora_A [r, in], lora_B [out, r]: the trained tensors. With an anchor they are δA, δB, zero at the start.
        notes: figures that the start left about itself, such as LoRA-GA's cosine with Adam's first step.
        start_A, start_B: the anchor A₀, B₀, or None. Without one, one half of the start is zero and trained in place.
        earlier: what pairs before this one learnt, frozen (:class:`rankwise.reshaping.EarlierChange`); or None.
    """

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, site: Site, kind: Kind, dropout: float, start: Start, *, anchored: bool) -> None:
        super().__init__(site, kind, dropout)
        self.register_buffer("start_A", start.A.clone() if anchored else None)
        self.register_buffer("start_B", start.B.clone() if anchored else None)
        self.notes = dict(start.notes)
        self.earlier: Any = None
        trained = torch.zeros_like if anchored else torch.clone
        self.lora_A = nn.Parameter(trained(start.A).contiguous())
        self.lora_B = nn.Parameter(trained(start.B).contiguous())

    @property
    def A(self) -> Float[Tensor, "r in"]:
        """The effective A = A₀ + δA."""
        return self.lora_A if self.start_A is None else self.start_A + self.lora_A

    @property
    def B(self) -> Float[Tensor, "out r"]:
        """The effective B = B₀ + δB."""
        return self.lora_B if self.start_B is None else self.start_B + self.lora_B


class TrainingHook(ABC):
    """What a variant does in a training loop beside the optimizer."""

    @abstractmethod
    def before_step(self, step: int) -> None:
        """Between ``backward`` and ``optimizer.step`` of a step, counted from 1."""

    @abstractmethod
    def finish(self, step: int) -> None:
        """After the last step, whether or not the run came to its planned end."""


class Variant(ABC):
    """The options of a variant (frozen dataclass fields); builds its layers.

    An adapter is saved as its layers' own state, in a directory that rankwise alone reads, unless the variant is a
    :class:`PairVariant`.

    Attributes:
        takes_start: whether its layers begin with an init's start pair. False: any init but the default is refused.
    """

    takes_start: ClassVar[bool] = True

    def anchored(self, anchor: Literal["frozen", "fold"]) -> "Variant":
        """The variant that builds layers for this kind of anchor.

        Raises:
            SpecError: none does.
        """
        if anchor == "fold":
            raise SpecError("anchor='fold' goes with variant='lora' only; leave anchor='frozen'")
        return self

    def check_site(self, site: Site, kind: Kind) -> None:
        """Refuse a site that cannot carry this variant.

        Raises:
            SpecError: the rank does not fit. TargetError: the kind of layer does not.
        """
        if site.rank > min(site.shape):
            raise SpecError(
                f"{site.name}: rank {site.rank} is larger than min(out, in) = {min(site.shape)} of its "
                f"{site.shape[0]} × {site.shape[1]} weight; lower rank, or set it for this module in rank_pattern"
            )

    def starting(self, site: Site) -> Site:
        """The site with the rank that training starts with: the spec's own, unless the variant prunes ranks later."""
        return site

    def parameters(self, site: Site) -> int:
        """How many numbers are trained at a site, for the plan: those of a pair."""
        return self.starting(site).parameters

    def adjusted(self, start: Start, generator: Generator, *, default: bool) -> Start:
        """What the variant makes of an init's start, or of zeros where a file is read that holds what it needs of it.

        Args:
            generator: derived from (seed, site name), apart from the init's: what is drawn from it alone is the same
                whenever the adapter is attached or loaded, and need not be in a file.
            default: whether the start is the default init's, which asks for nothing else.
        """
        return start

    @abstractmethod
    def build(
        self, site: Site, kind: Kind, weight: Float[Tensor, "out in"], start: Start, dropout: float
    ) -> AdapterLayer:
        """One site's adapter layer for a new adapter, in the dtype and on the device of the start pair.

        Args:
            site: as the spec has it; the rank of the start may be larger (:meth:`starting`).
        """

    def training_hook(self, model: nn.Module, total_steps: int) -> TrainingHook | None:
        """What is to run beside the optimizer of ``model``, which trains such an adapter; None: nothing."""
        return None


class PairVariant(Variant):
    """A variant that is written as a PEFT directory: a pair for each site, and perhaps tensors beside it.

    Attributes:
        marks: entries of PEFT's configuration by which any reader knows a file to be this variant's. Without any, PEFT
            reads the pair as plain LoRA, so that must be the same function; ``rankwise.json`` still names the variant.
        tensors: file suffixes of what :meth:`FoldableLayer.extra_tensors` gives; they begin with "lora_" and need
            marks.
        saved_as_lora: whether a saved adapter is plain LoRA from then on, even where it is trained on.
    """

    marks: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    tensors: ClassVar[tuple[str, ...]] = ()
    saved_as_lora: ClassVar[bool] = False

    @abstractmethod
    def build(
        self, site: Site, kind: Kind, weight: Float[Tensor, "out in"], start: Start, dropout: float
    ) -> FoldableLayer: ...

    @abstractmethod
    def restore(
        self, site: Site, kind: Kind, weight: Float[Tensor, "out in"], delta: LowRank, extra: Mapping[str, Tensor]
    ) -> FoldableLayer:
        """One site's adapter layer from what :meth:`FoldableLayer.delta` and ``extra_tensors`` gave a file."""
