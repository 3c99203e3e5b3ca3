"""AdaLoRA's rank allocator (Zhang 2023, arXiv 2303.10512, algorithm 1): one budget of ranks for all sites.

Its only state are buffers of the adapter layers, so a model's ``state_dict`` and ``rankwise.format.state.save_state``
carry it: a resumed run makes a new allocator and goes on.
"""

import logging

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError, Diverged, SpecError, TrainingError
from rankwise.shapes import Bool, Float
from rankwise.variants.adalora import AdaLoraLayer
from rankwise.variants.base import TrainingHook

log = logging.getLogger("rankwise")


def cubic_budget(step: int, start: int, target: int, t_initial: int, total: int, t_final: int) -> int:
    """b(t): ``start`` until t_initial, then a cubic fall to ``target`` at total − t_final, then constant.

    b(t) = target + (start − target)(1 − (t − t_i)/(T − t_i − t_f))³. (The paper's equation 14 has another argument
    of the cube, which exceeds ``start`` at t_i; its figure and code have this one.)

    >>> [cubic_budget(t, 12, 8, 10, 100, 30) for t in (0, 10, 20, 40, 70, 100)]
    [12, 12, 10, 8, 8, 8]
    """
    if step <= t_initial:
        return start
    left = max(1.0 - (step - t_initial) / (total - t_initial - t_final), 0.0)
    return target + int((start - target) * left**3)


class RankAllocator(TrainingHook):
    """Shares the ranks out over the sites of an AdaLoRA adapter. Needs one call a step, in any loop::

        allocator = RankAllocator(model, total_steps)
        for step, batch in enumerate(batches, 1):
            (model(**batch).loss + allocator.penalty()).backward()
            allocator.step(step)
            optimizer.step()
            optimizer.zero_grad()

    Attributes:
        layers: the AdaLoRA layers that are being trained.
        start, target: the total rank now and in the end.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        """Take the trainable AdaLoRA layers of a model.

        Args:
            total_steps: optimizer steps of the whole run.

        Raises:
            AttachError: there are none. SpecError: t_initial + t_final leave no step to prune at.
        """
        self.layers = adalora_layers(model)
        if not self.layers:
            raise AttachError(
                "this model trains no AdaLoRA adapter; expected rankwise.attach(model, LoRA(variant='adalora', ...))"
            )
        self.options = self.layers[0].options
        self.total_steps = total_steps
        self.t_initial, self.t_final = (_steps(t, total_steps) for t in (self.options.t_initial, self.options.t_final))
        if self.t_initial + self.t_final >= total_steps:
            raise SpecError(
                f"variant 'adalora': t_initial = {self.t_initial} and t_final = {self.t_final} steps leave none of "
                f"{total_steps} to prune at; expected less in all"
            )
        self.start = sum(layer.lora_A.shape[0] for layer in self.layers)
        self.target = sum(layer.target_rank for layer in self.layers)

    @property
    def finished(self) -> bool:
        """Whether the final ranks are settled."""
        return self.total_rank == self.target

    @property
    def ranks(self) -> dict[str, int]:
        """Site name → rank that is left."""
        return {layer.site.name: int(layer.kept.sum()) for layer in self.layers}

    @property
    def total_rank(self) -> int:
        """What is left in all."""
        return sum(self.ranks.values())

    def budget(self, step: int) -> int:
        """The total rank after this step, counted from 1."""
        return cubic_budget(step, self.start, self.target, self.t_initial, self.total_steps, self.t_final)

    def step(self, step: int) -> None:
        """Note this step's gradients and prune where it is time. Between ``backward`` and ``optimizer.step``.

        Args:
            step: the number of the optimizer step, from 1.

        Raises:
            TrainingError: no layer has a gradient. Diverged: a score is not finite.
        """
        if self.finished:
            return
        self._update_scores()
        if step >= self.total_steps - self.t_final:
            self.settle()
        elif step > self.t_initial and step % self.options.delta_t == 0:
            self._prune(self.budget(step), for_good=False)

    def before_step(self, step: int) -> None:
        """:meth:`step`, where the penalty is not part of the loss: its gradient is added first."""
        self.add_penalty_gradient()
        self.step(step)

    def finish(self, step: int) -> None:
        """Settle the final ranks if the run ended before its pruning did."""
        if not self.finished:
            log.warning(
                "AdaLoRA: the run ended at step %d, before its pruning did; cut to a total rank of %d now",
                step,
                self.target,
            )
            self.settle()

    def settle(self) -> None:
        """Keep the ``target`` most important triplets for good."""
        self._prune(self.target, for_good=True)

    def penalty(self) -> Tensor:
        """γ · mean over sites of ‖BᵀB − I‖²_F + ‖AAᵀ − I‖²_F, to add to the loss.

        The paper sums over sites; the mean keeps γ's meaning whatever the number of layers, as the authors' code does.
        """
        return self.options.orthogonal_weight * torch.stack([layer.penalty() for layer in self.layers]).mean()

    def add_penalty_gradient(self) -> None:
        """Add the penalty's gradient to ``.grad``, where it is not part of the loss (a trainer's callback)."""
        if self.options.orthogonal_weight == 0:
            return
        factors = [factor for layer in self.layers for factor in (layer.lora_A, layer.lora_B)]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.penalty(), factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)

    @torch.no_grad()
    def _update_scores(self) -> None:
        """I = |w·∇w|; Ī ← β₁Ī + (1 − β₁)I; Ū ← β₂Ū + (1 − β₂)|I − Ī|, entry by entry."""
        factors = [factor for layer in self.layers for factor in layer.factors()]
        if all(parameter.grad is None for parameter, _, _ in factors):
            raise TrainingError("no AdaLoRA layer has a gradient; expected step() after backward and before zero_grad")
        weights = [parameter for parameter, _, _ in factors]
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]  # an expert that no token chose
        means, spreads = [mean for _, mean, _ in factors], [spread for _, _, spread in factors]
        now = list(torch._foreach_mul(weights, grads))
        torch._foreach_abs_(now)
        torch._foreach_lerp_(means, now, 1.0 - self.options.beta1)
        torch._foreach_sub_(now, means)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(spreads, now, 1.0 - self.options.beta2)

    def _prune(self, budget: int, *, for_good: bool) -> None:
        scores = torch.cat([layer.scores().cpu() for layer in self.layers])
        if not bool(scores.isfinite().all()):
            raise Diverged("AdaLoRA's importance scores hold NaN or infinity: the training diverged")
        sizes = [layer.lora_A.shape[0] for layer in self.layers]
        chosen = torch.split(most_important(scores, budget), sizes)
        largest = max(int(mask.sum()) for mask in chosen)
        for layer, mask in zip(self.layers, chosen, strict=True):
            layer.mask(mask.to(layer.kept.device), for_good=for_good)
            if for_good and self.options.padded:
                layer.padded_rank.fill_(largest)


def adalora_layers(model: nn.Module) -> list[AdaLoraLayer]:
    """The AdaLoRA layers that are being trained, in the model's order."""
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    return [layer for layer in layers if layer.lora_E.requires_grad]


def most_important(scores: Float[Tensor, " n"], budget: int) -> Bool[Tensor, " n"]:
    """Exactly ``budget`` of all triplets, by one threshold for all sites; the earlier one where scores are equal."""
    order = scores.argsort(descending=True, stable=True)
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[:budget]] = True
    return chosen


def _steps(value: float, total: int) -> int:
    """A number of steps, or a share of the run."""
    return round(value * total) if value < 1 else int(value)
