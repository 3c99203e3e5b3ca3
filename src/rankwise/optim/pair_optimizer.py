"""What every optimizer of pairs shares: groups, checks, masters, the step, its state. A method adds its direction.

A direction is one pure function that reads like its paper:

    direction(A, B, grad_A, grad_B, scale, state, **options) -> (direction of A, direction of B)

A [*n, r, in] and B [*n, out, r] are the effective factors of pairs of equal shape and scale (*n stacks them), in fp32
or finer. ``state`` is a dict, empty before the first step, which the function fills and updates in place with numbers
and with tensors [*n, ...]. Each trained tensor p then moves as p ← (1 − lr·weight_decay) p − lr·direction.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rankwise.errors import CheckpointError, Diverged, SpecError, TrainingError
from rankwise.optim.checks import check_number
from rankwise.optim.elementwise import State, adam_direction
from rankwise.optim.masters import move, wide
from rankwise.pair import Pair, pairs
from rankwise.placement import whole_tensor
from rankwise.variants.lora import LoraLayer

T = TypeVar("T", bound="PairOptimizer")
Direction = Callable[..., tuple[Tensor, Tensor]]
ADAM: Mapping[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
# Entries of the matrices that a stack of pairs holds: 1 MiB in fp32, which stays in a CPU's cache, or 256 MiB. Measured
# on one core with LoRA-Pro's AdamW form: 60 pairs of 64² 3.7 times faster together, 30 of 576² 2 times slower.
_STACKED_ENTRIES = {"cpu": 2**18}
_STACKED_ENTRIES_ELSEWHERE = 2**26


class PairOptimizer(torch.optim.Optimizer):
    """An optimizer of typed pairs. A method is a thin subclass that names its direction and its options.

    Everything that is trained must be handed over: the pairs as pairs, and what is in none (a DoRA magnitude, a new
    head) as ``others``, which get AdamW unless the method says otherwise. :meth:`for_model` collects both.

    With an anchored start the trained tensors are δA and δB. The gradients are the same, the direction sees the
    effective A and B, and weight decay pulls δ to zero: towards the pretrained model.

    Tensors in bf16 or fp16 are stepped in fp32: the optimizer keeps the unrounded value (its master) in its state, so
    that steps too small for the parameter's precision add up.

    Attributes:
        invariant: whether the first step's change of the weight is the same for (A, B) and (TA, BT⁻¹).
        dense: whether the direction or its state is as large as the weight, [out, in] for each pair.
        others_lr: the rate of what is in no pair, unless its group brings one; None: that of the pairs. A method whose
            rate is a distance in W has another for AdamW's.
    """

    invariant: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    others_lr: ClassVar[float | None] = None

    def __init__(
        self,
        pairs: Iterable[Pair],
        direction: Direction,
        options: Mapping[str, Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        others: Iterable[Any] = (),
        others_direction: Callable[..., Tensor] = adam_direction,
        others_options: Mapping[str, Any] = ADAM,
    ) -> None:
        """See the subclasses for what users give.

        Args:
            direction, options: the method, and what it takes beside the pair. Options live in the pairs' parameter
                group, where a schedule may change them.
            others: tensors, or groups of them (dicts with ``params`` and options such as ``lr``).
            others_direction, others_options: the same for ``others``: a function of (gradient, state, **options).

        Raises:
            SpecError: an option out of range, a pair that is frozen or given twice, a trained tensor of an adapter
                layer that is neither in a pair nor in ``others``.
        """
        check_number("lr", lr, above_zero=True)
        check_number("weight_decay", weight_decay, above_zero=False)
        self.pairs = tuple(pairs)
        self.direction, self.others_direction = direction, others_direction
        self._options, self._others_options = tuple(options), tuple(others_options)
        of_pairs = {"params": [p for pair in self.pairs for p in pair.parameters], "name": "pairs", **options}
        rest = {"lr": lr if self.others_lr is None else self.others_lr}
        groups = [of_pairs, *({**rest, **group} for group in _groups(others))]
        self._check_complete([p for group in groups for p in group["params"]])
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **others_options})

    @classmethod
    def for_model(cls: type[T], model: nn.Module, lr: float, *, others_lr: float | None = None, **options: Any) -> T:
        """The optimizer of everything trainable in ``model``: the active adapter's pairs, and the rest as others.

        Args:
            others_lr: of what is in no pair; None: the method's own default.

        Raises:
            AttachError: the model has no adapter, or not exactly one is active.
        """
        if others_lr is not None:
            check_number("others_lr", others_lr, above_zero=True)
        active = pairs(model)
        paired = {id(p) for pair in active for p in pair.parameters}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
        rate = {} if others_lr is None else {"lr": others_lr}
        return cls(active, lr=lr, others=[{"params": rest, **rate}] if rest else [], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. A pair or tensor without a gradient (an expert that no token chose) is left alone.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.

        Raises:
            TrainingError: a gradient on one half of a pair only. Diverged: NaN or infinity. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [pair for pair in self.pairs if _has_gradients(pair)]
        self._check_finite(moving)
        for stack in self._stacks(moving):
            self._step_pairs(stack)
        for group in self.param_groups[1:]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_other(parameter, group)
        return loss

    def _step_pairs(self, stack: Sequence[Pair]) -> None:
        """One step of pairs that a direction can take together."""
        group = self.param_groups[0]
        halves = list(zip(*(pair.parameters for pair in stack), strict=True))  # every A, every B
        starts = [pair.layer.start_A for pair in stack], [pair.layer.start_B for pair in stack]
        values = [[wide(parameter, self.state[parameter]) for parameter in half] for half in halves]
        A, B = (_stack([*map(_effective, *half)]) for half in zip(starts, values, strict=True))
        grad_A, grad_B = (_stack([_gradient(parameter).to(A.dtype) for parameter in half]) for half in halves)
        states = [_of_direction(self.state[parameter]) for parameter in halves[0]]
        state = {name: _stack([state[name] for state in states]) for name in states[0]}
        directions = self.direction(A, B, grad_A, grad_B, stack[0].scale, state, **self.options(stack))
        for i, parameter in enumerate(halves[0]):
            self.state[parameter].update({name: _slice(value, i) for name, value in state.items()})
        for half, before, direction in zip(halves, values, directions, strict=True):
            for parameter, value, part in zip(half, before, direction, strict=True):
                move(parameter, value, part, group, self.state[parameter])

    def options(self, stack: Sequence[Pair]) -> dict[str, Any]:
        """What the direction takes beside these pairs; a method may add what differs from pair to pair, as [n]."""
        return {name: self.param_groups[0][name] for name in self._options}

    def _step_other(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        options = {name: group[name] for name in self._others_options}
        value, state = wide(parameter, self.state[parameter]), _of_direction(self.state[parameter])
        direction = self.others_direction(_gradient(parameter).to(value.dtype), state, **options)
        self.state[parameter].update(state)
        move(parameter, value, direction, group, self.state[parameter])

    def _stacks(self, moving: Iterable[Pair]) -> Iterator[Sequence[Pair]]:
        """The pairs, together where shape, scale, device and the numbers in their states are equal."""
        alike: dict[Any, list[Pair]] = {}
        for pair in moving:
            A, B = pair.parameters
            state = {name: None if isinstance(value, Tensor) else value for name, value in self.state[A].items()}
            key = A.shape, B.shape, A.dtype, A.device, pair.scale, tuple(sorted(state.items()))
            alike.setdefault(key, []).append(pair)
        for members in alike.values():
            A, B = members[0].parameters
            entries = len(B) * A.shape[1] if self.dense else A.numel() + B.numel()
            size = max(1, _STACKED_ENTRIES.get(A.device.type, _STACKED_ENTRIES_ELSEWHERE) // entries)
            yield from (members[i : i + size] for i in range(0, len(members), size))

    @property
    def method(self) -> str:
        """What a saved state must have been made by."""
        return f"{type(self).__name__}, {self.direction.__name__}"

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with the method and the names of the pairs, so that it goes back where it came from."""
        return {**super().state_dict(), "method": self.method, "pairs": [pair.name for pair in self.pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state over: from here training goes on bit for bit.

        Raises:
            CheckpointError: it was saved for other pairs or by another method.
        """
        for name, expected in (("pairs", [pair.name for pair in self.pairs]), ("method", self.method)):
            if state_dict.get(name) != expected:
                raise CheckpointError(f"optimizer state: expected the {name} {expected}, found {state_dict.get(name)}")
        super().load_state_dict(state_dict)
        # torch casts tensors to the parameter's dtype, which would round them; put them back as they were saved.
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _check_finite(self, moving: Iterable[Pair]) -> None:
        """Refuse a gradient with NaN or infinity before anything moves."""
        gradients = {pair.name: [p.grad for p in pair.parameters] for pair in moving}
        gradients["what is in no pair"] = [p.grad for group in self.param_groups[1:] for p in group["params"]]
        present = {name: [g for g in parts if g is not None] for name, parts in gradients.items()}
        if whole_tensor(torch.nn.utils.get_total_norm(chain.from_iterable(present.values()))).isfinite():
            return
        # The norm may overflow where no entry does, as in fp16.
        broken = [
            name for name, parts in present.items() if not all(bool(whole_tensor(g.isfinite()).all()) for g in parts)
        ]
        if broken:
            raise Diverged(
                f"{broken[0]}: its gradient holds NaN or infinity ({len(broken)} like this); lower lr (now "
                f"{self.param_groups[0]['lr']:g}), clip the gradients, or train in fp32 or bf16"
            )

    def _check_complete(self, given: Sequence[Tensor]) -> None:
        """``given`` has every trained tensor of the pairs' layers, and has it once."""
        if not self.pairs:
            raise SpecError(
                f"pairs: {type(self).__name__} moves s·BA; expected one pair at least, as rankwise.pairs(model) gives "
                f"them, found none; train what has none, such as a bottleneck, with AdamW"
            )
        times = Counter(map(id, given))
        for pair in self.pairs:
            if not isinstance(pair.layer, LoraLayer):
                raise SpecError(
                    f"{pair.name}: {type(self).__name__} moves s·BA; expected the variant 'lora' or 'dora', "
                    f"found {type(pair.layer).__name__}; train it with AdamW"
                )
            if any(times[id(p)] > 1 for p in pair.parameters):
                raise SpecError(f"{pair.name}: given twice; expected every pair once, and neither half in others=")
            if not all(p.requires_grad for p in pair.parameters):
                raise SpecError(f"{pair.name}: expected both halves of the pair to be trainable, found a frozen one")
            for name, parameter in pair.layer.named_parameters():
                if parameter.requires_grad and id(parameter) not in times:
                    raise SpecError(
                        f"{pair.name}: its trainable {name!r} is in no pair and would never be stepped; "
                        f"pass it in others=, or use {type(self).__name__}.for_model(model, ...)"
                    )


def _groups(others: Iterable[Any]) -> list[dict[str, Any]]:
    """Tensors, or groups of them, as groups; none where there is nothing."""
    given = list(others)
    if given and all(isinstance(group, Mapping) for group in given):
        return [{"name": "others", **group, "params": list(group["params"])} for group in given]
    return [{"name": "others", "params": given}] if given else []


def _has_gradients(pair: Pair) -> bool:
    """Whether the pair is to be moved.

    Raises:
        TrainingError: only one half has a gradient.
    """
    has = [p.grad is not None for p in pair.parameters]
    if any(has) and not all(has):
        raise TrainingError(f"{pair.name}: one half of the pair has a gradient, the other none; expected both")
    return all(has)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return whole_tensor(parameter.grad)


def _effective(start: Tensor | None, trained: Tensor) -> Tensor:
    """start + δ; the trained tensor itself where there is no anchor."""
    return trained if start is None else start.to(trained.dtype) + trained


def _of_direction(state: State) -> State:
    """A tensor's state without its master: what the direction itself keeps."""
    return {name: value for name, value in state.items() if name != "master"}


def _stack(values: list[Any]) -> Any:
    """Tensors as one [n, ...], of a single tensor a view; of numbers, which are equal in a stack, one."""
    if not isinstance(values[0], Tensor):
        return values[0]
    return values[0][None] if len(values) == 1 else torch.stack(values)


def _slice(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, Tensor) else value
