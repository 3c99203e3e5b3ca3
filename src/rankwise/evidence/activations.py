"""What layers are fed: the principal directions of their inputs, and their covariance. Forward passes only."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.algebra.precision import at_least_fp32
from rankwise.algebra.svd import truncated_svd
from rankwise.collection import EXTRA_DIRECTIONS
from rankwise.errors import EvidenceError, NonFiniteActivation
from rankwise.evidence.processes import everyones, failing_together, process_count, summed, total
from rankwise.evidence.undisturbed import each_batch, hooked, layer_input, run_forward, undisturbed
from rankwise.layers.kinds import kind_of
from rankwise.planning import target_layers
from rankwise.shapes import Float

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, eq=False)
class InputDirections:
    """The leading principal directions of one layer's inputs.

    Attributes:
        components: right-singular vectors of the centred inputs, orthonormal rows [k, in], the strongest first.
        singular_values: [k], descending.
        explained: σ²/Σσ², the share of the inputs' variance along each, [k].
        count: how many input vectors were seen.
    """

    components: Float[Tensor, "k in"]
    singular_values: Float[Tensor, " k"]
    explained: Float[Tensor, " k"]
    count: int


@dataclass(frozen=True, eq=False)
class InputCovariance:
    """The second moment of one layer's inputs, not centred.

    Attributes:
        matrix: C = Σ x xᵀ / n, [in, in], fp32 or finer.
        count: n.
    """

    matrix: Float[Tensor, "in in"]
    count: int


def activations(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Iterable[str] = "all-linear",
    *,
    rank: int = 16,
    forward: Forward | None = None,
) -> dict[str, InputDirections]:
    """The ``rank`` principal directions of each chosen layer's inputs over the batches: what EVA starts from.

    One pass, one incremental SVD a layer (Ross 2008, "Incremental Learning for Robust Visual Tracking", section 3.3):
    (rank + 8) · in numbers are held, never the inputs themselves. A convolution's inputs are its patches.

    Args:
        batches: dicts for ``model(**batch)``, or anything that ``forward(model, batch)`` takes. Where a batch has an
            ``attention_mask`` [batch, tokens], layers that see one vector a token leave the masked ones out.
        target_modules: as in ``LoRA``.

    Returns:
        Module path → evidence.

    Raises:
        EvidenceError: no batches, a layer that did not run or saw too few vectors, an embedding.
        NonFiniteActivation: NaN or infinity in a layer's input. The model is left exactly as it was.
    """
    layers = target_layers(model, target_modules)
    return input_directions(model, layers, batches, dict.fromkeys(layers, rank), forward)


def covariances(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Iterable[str] = "all-linear",
    *,
    forward: Forward | None = None,
) -> dict[str, InputCovariance]:
    """C = Σ x xᵀ / n of each chosen layer's inputs: what CorDA starts from. in² numbers a layer.

    Arguments and errors are those of :func:`activations`.
    """
    return input_covariances(model, target_layers(model, target_modules), batches, forward)


def input_directions(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    ranks: Mapping[str, int],
    forward: Forward | None = None,
) -> dict[str, InputDirections]:
    """:func:`activations` for layers that are already chosen, each with its own number of directions."""
    running = {name: RunningSVD(ranks[name] + EXTRA_DIRECTIONS) for name in layers}
    _run_inputs(model, layers, batches, forward, running)
    for name in layers:
        running[name].join()
    return {name: running[name].leading(ranks[name], name) for name in layers}


def input_covariances(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], forward: Forward | None = None
) -> dict[str, InputCovariance]:
    """:func:`covariances` for layers that are already chosen."""
    running = {name: RunningCovariance(kind_of(layer).shape(layer)[1]) for name, layer in layers.items()}
    _run_inputs(model, layers, batches, forward, running)
    return {name: running[name].result(name) for name in layers}


class RunningCovariance:
    """Σ x xᵀ of rows of ``width`` numbers that come in batches."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self.sum: Tensor = torch.zeros(())

    def add(self, rows: Float[Tensor, "m in"]) -> None:
        self.sum = self.sum.addmm_(rows.T, rows) if self.count else rows.T @ rows
        self.count += len(rows)

    def result(self, name: str) -> InputCovariance:
        """The mean over all processes' rows."""
        count = total(self.count)
        _check_count(name, count, 1)
        return InputCovariance(summed(self.sum if self.count else torch.zeros(self.width, self.width)) / count, count)


class RunningSVD:
    """The leading principal directions of rows that come in batches, and their whole variance.

    With n rows of mean μ and centred SVD ≈ S Vᵀ so far, m new rows X of mean ν turn it into the SVD of
    [S Vᵀ; X − ν; √(nm/(n+m)) (μ − ν)], of which the leading ``width`` triplets are kept.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self.variance = 0.0  # Σ‖x − μ‖²
        self.mean: Tensor = torch.zeros(())
        self.s: Tensor = torch.zeros(())  # [k]
        self.v: Tensor = torch.zeros(())  # [in, k]

    def add(self, rows: Float[Tensor, "m in"]) -> None:
        """Take a batch of rows in."""
        mean = rows.mean(0)
        centred = rows - mean
        self._take(len(rows), float(centred.double().square().sum()), mean, centred)

    def _take(self, count: int, variance: float, mean: Float[Tensor, " in"], scaled: Float[Tensor, "q in"]) -> None:
        """Join ``count`` rows known by their mean, their Σ‖x − mean‖² and a square root ``scaled`` of their scatter."""
        if self.count:
            weight = self.count * count / (self.count + count)
            apart = weight**0.5 * (self.mean - mean)[None]
            variance += float(apart.double().square().sum())
            scaled = torch.cat([self.s[:, None] * self.v.T, scaled, apart])
            mean = self.mean + (mean - self.mean) * (count / (self.count + count))
        generator = torch.Generator().manual_seed(0)
        _, self.s, self.v = truncated_svd(scaled, min(self.width, *scaled.shape), generator)
        self.mean = mean
        self.variance += variance
        self.count += count

    def join(self) -> None:
        """Make it the directions of all processes' rows."""
        if process_count() == 1:
            return
        scaled = (self.s[:, None] * self.v.T).cpu() if self.count else self.v
        joined = RunningSVD(self.width)
        for count, variance, mean, rows in everyones((self.count, self.variance, self.mean.cpu(), scaled)):
            if count:
                joined._take(count, variance, mean, rows)
        vars(self).update(vars(joined))

    def leading(self, k: int, name: str) -> InputDirections:
        """The first k directions.

        Raises:
            EvidenceError: fewer than k + 1 rows came in, which centred span fewer than k directions.
        """
        _check_count(name, self.count, k + 1)
        s = self.s[:k]
        explained = s.double().square() / max(self.variance, torch.finfo(torch.float64).tiny)
        return InputDirections(self.v[:, :k].T, s, explained.to(s.dtype), self.count)


def _check_count(name: str, count: int, needed: int) -> None:
    if count < needed:
        raise EvidenceError(
            f"{name}: saw {count} input vectors that are not padding, expected at least {needed}; give more batches, "
            f"or exclude the layer if the data never reaches it"
        )


def _run_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    forward: Forward | None,
    running: Mapping[str, RunningSVD | RunningCovariance],
) -> None:
    """Forward over the batches, each layer's inputs [n, in] going to its accumulator, padding left out."""
    mask: Tensor | None = None

    def take(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        rows = _rows(name, layer, layer_input(args, kwargs), mask)
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteActivation(
                f"{name}: its input holds NaN or infinity; look at the batches, or load the model in fp32 or bf16"
            )
        if len(rows):
            running[name].add(rows)

    with failing_together(), undisturbed(model), hooked(layers, take), torch.no_grad():
        for batch in each_batch(batches):
            mask = _mask(batch)
            (forward or run_forward)(model, batch)


def _rows(name: str, layer: nn.Module, x: Tensor, mask: Tensor | None) -> Float[Tensor, "n in"]:
    """The layer's input vectors, without those that are padding."""
    try:
        rows = at_least_fp32(kind_of(layer).inputs(layer, x.detach()))
    except EvidenceError as error:
        raise EvidenceError(f"{name}: {error}") from None
    return rows if mask is None or len(mask) != len(rows) else rows[mask.to(rows.device)]


def _mask(batch: Any) -> Tensor | None:
    """True where a token is real, one entry a token; None where the batch does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.flatten().bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
