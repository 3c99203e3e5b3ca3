"""Rows of an embedding that are trained whole, such as those of new tokens; and a layer tied to it, which follows."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.algebra.precision import fp32_or_finer
from rankwise.in_place import is_transformed, writable
from rankwise.layers.kinds import EmbeddingKind, kind_of
from rankwise.shapes import Float
from rankwise.sites import Site
from rankwise.trained_beside import TrainedBeside
from rankwise.variants.base import ALL, AdapterLayer, WeightChange


class TokenRows(WeightChange):
    """The layer's weight with other rows at some ids. As in PEFT, values and no changes are what a file keeps.

    New tokens' rows are random in each newly resized model, so a change of them would mean nothing there. The forward
    adds what they differ by from the layer's own, which is 0 at the start.

    Attributes:
        rows: the trained values [n, dim].
        ids: [n].
    """

    ids: Tensor

    def __init__(self, path: str, layer: nn.Module, ids: tuple[int, ...], rows: Float[Tensor, "n dim"]) -> None:
        kind = kind_of(layer)
        super().__init__(Site(path, kind.name, kind.shape(layer), len(ids), 1.0), kind, 0.0)
        self.register_buffer("ids", torch.tensor(ids, device=rows.device))
        self.rows = nn.Parameter(rows.detach().to(fp32_or_finer(layer.get_parameter("weight").dtype), copy=True))

    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        part: Tensor
        moved = self.rows - layer.get_parameter("weight").detach()[self.ids].to(self.rows)
        ids = self.ids.to(x.device)
        if not isinstance(kind_of(layer), EmbeddingKind):  # an output head
            part = F.linear(x, moved.to(x)).to(y.dtype)
            return (y.clone() if is_transformed() else writable(layer, y)).index_add_(-1, ids, part)
        ordered, order = ids.sort()
        place = torch.searchsorted(ordered, x).clamp_max(len(ids) - 1)
        part = moved.to(y.device)[order[place]] * EmbeddingKind.output_scale(layer)
        return (y + part * (ordered[place] == x)[..., None]).to(y.dtype)

    def change(self, weight: Float[Tensor, "n in"], rows: slice = ALL) -> Float[Tensor, "n in"]:
        change = torch.zeros_like(weight)
        if isinstance(self.kind, EmbeddingKind):  # [dim, vocabulary]
            change[:, self.ids] = self.rows.T[rows].to(weight) - weight[:, self.ids]
        else:
            first = rows.start or 0
            here = (self.ids >= first) & (self.ids < first + len(weight))
            change[self.ids[here] - first] = self.rows[here].to(weight) - weight[self.ids[here] - first]
        return change


class TiedRows(AdapterLayer):
    """What a layer that shares an embedding's weight makes of its trained rows. It has no tensors of its own."""

    def __init__(self, path: str, layer: nn.Module, source: TokenRows) -> None:
        kind = kind_of(layer)
        super().__init__(Site(path, kind.name, kind.shape(layer), source.site.rank, 1.0), kind, 0.0)
        self.source = (source,)  # in a tuple, so that it is no child module

    def adapt(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.source[0].adapt(layer, x, y)


def beside_layers(
    model: nn.Module, beside: TrainedBeside, values: Mapping[str, Tensor] | None = None
) -> dict[str, AdapterLayer]:
    """Path → the layer for the rows that are trained there, and for those that follow.

    Args:
        values: path → rows to begin with; None: the model's own.
    """
    layers: dict[str, Any] = {}
    for path, ids in beside.tokens.items():
        layer = model.get_submodule(path)
        weight: Tensor = layer.get_parameter("weight").detach()
        rows = weight[list(ids)] if values is None else values[path].to(weight.device)
        layers[path] = TokenRows(path, layer, ids, rows)
    layers |= {path: TiedRows(path, model.get_submodule(path), layers[source]) for path, source in beside.tied.items()}
    return layers
