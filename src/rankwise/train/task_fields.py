"""The recipe's fields that belong to one task, and the losses that a task can be trained with.

They bear TRL's names and are handed to TRL word for word; None leaves a field to TRL's default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from rankwise.methods import nearest
from rankwise.train.section import Section, UserPath

Metric = Literal["exact", "matthews", "number"]
Weight = Annotated[float, Field(ge=0)]


class PreferenceFields(Section):
    """Preferences"""

    loss: str | list[str] | None = Field(
        None, description="With task preference: dpo (the default), ipo, kto, reward ..., or a list that is added up."
    )
    loss_weights: list[Weight] | None = Field(None, description="One weight for each of several losses; default: 1.")
    beta: Weight | None = Field(None, description="How much leaving the base model costs; default: 0.1.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = Field(
        None, description="How likely a preference is the wrong way round, with losses that take it; default: 0."
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = Field(
        None, description="The divergence from the base model that DPO's kin bound; default: reverse_kl."
    )
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Weight of the part of an answer beyond the shorter one's length (LD-DPO); default: 1."
    )
    desirable_weight: Weight | None = Field(None, description="With kto: weight of desirable answers; default: 1.")
    undesirable_weight: Weight | None = Field(None, description="With kto: weight of undesirable ones; default: 1.")
    center_rewards_coefficient: Weight | None = Field(
        None, description="With reward: pulls the rewards' mean towards zero; default: 0."
    )
    precompute_ref_log_probs: bool | None = Field(
        None, description="Compute the base model's log probabilities once, before training; default: in each step."
    )


class GroupFields(Section):
    """Rewards"""

    reward: UserPath | None = Field(
        None, description="With task grpo: exact, number, reasoning-gym, or a Python file with a function reward."
    )
    num_generations: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Answers to each prompt, that are compared with each other; default: 8."
    )
    max_completion_length: Annotated[int, Field(gt=0, lt=2**31)] | None = Field(
        None, description="Tokens that an answer may have in training; default: 512."
    )
    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Of the sampling of answers; default: 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of probability that answers are sampled from; default: 1."
    )


class AnswerFields(Section):
    """Generated answers"""

    answer_metric: Metric | list[Metric] | None = Field(
        None, description="Answer held-out prompts in each evaluation, and score that; default: losses only."
    )
    max_new_tokens: Annotated[int, Field(gt=0, lt=2**31)] | None = Field(
        None, description="Tokens that an answer which is scored may have; default: 64."
    )

    @property
    def answer_metrics(self) -> list[str]:
        """The names in ``answer_metric``."""
        given = self.answer_metric
        return [] if given is None else [given] if isinstance(given, str) else list(given)

    @property
    def answer_tokens(self) -> int:
        """``max_new_tokens``, or its default."""
        return 64 if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class Loss:
    """One loss of TRL's on preferences.

    Attributes:
        kind: what it is computed from: ``"pairs"`` of answers, ``"unpaired"`` ones with a label each, or the
            ``"reward"`` that a new head gives each of a pair.
        trl: TRL's name for it.
        paper: where it comes from.
    """

    kind: Literal["pairs", "unpaired", "reward"]
    trl: str
    paper: str


PREFERENCE_LOSSES: dict[str, Loss] = {
    "dpo": Loss("pairs", "sigmoid", "arXiv 2305.18290"),
    "sigmoid_norm": Loss("pairs", "sigmoid_norm", "arXiv 2405.14734"),
    "hinge": Loss("pairs", "hinge", "arXiv 2305.10425"),
    "ipo": Loss("pairs", "ipo", "arXiv 2310.12036"),
    "exo_pair": Loss("pairs", "exo_pair", "arXiv 2402.00856"),
    "nca_pair": Loss("pairs", "nca_pair", "arXiv 2402.05369"),
    "robust": Loss("pairs", "robust", "arXiv 2403.00409"),
    "bco_pair": Loss("pairs", "bco_pair", "arXiv 2404.04656"),
    "sppo_hard": Loss("pairs", "sppo_hard", "arXiv 2405.00675"),
    "aot": Loss("pairs", "aot", "arXiv 2406.05882"),
    "aot_unpaired": Loss("pairs", "aot_unpaired", "arXiv 2406.05882"),
    "apo_zero": Loss("pairs", "apo_zero", "arXiv 2408.06266"),
    "apo_down": Loss("pairs", "apo_down", "arXiv 2408.06266"),
    "discopop": Loss("pairs", "discopop", "arXiv 2406.08414"),
    "sft": Loss("pairs", "sft", "arXiv 2411.10442"),
    "kto": Loss("unpaired", "kto", "arXiv 2402.01306"),
    "apo_zero_unpaired": Loss("unpaired", "apo_zero_unpaired", "arXiv 2408.06266"),
    "reward": Loss("reward", "reward", "arXiv 2203.02155"),
}

# What TRL's trainer of each kind takes, beside the loss.
OPTIONS: dict[str, tuple[str, ...]] = {
    "pairs": (
        *("loss_weights", "beta", "label_smoothing", "f_divergence_type", "ld_alpha"),
        "precompute_ref_log_probs",
    ),
    "unpaired": ("beta", "desirable_weight", "undesirable_weight", "precompute_ref_log_probs"),
    "reward": ("center_rewards_coefficient",),
}

GROUP_OPTIONS = ("num_generations", "max_completion_length", "temperature", "top_p")
GROUP_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "vespo")

TASKS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PreferenceFields.model_fields, ("preference",)),
    **dict.fromkeys(GroupFields.model_fields, ("grpo",)),
    **dict.fromkeys(("loss", "beta"), ("preference", "grpo")),
    **dict.fromkeys(AnswerFields.model_fields, ("causal-lm", "seq2seq")),
}


def losses(loss: str | Sequence[str] | None) -> list[str]:
    """The names in a recipe's ``loss``, of a task on preferences."""
    return ["dpo"] if loss is None else [loss] if isinstance(loss, str) else list(loss)


def misplaced(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) of each that is set and does not go with the recipe's task or loss."""
    task = fields["task"]
    given = [name for name in TASKS_OF if fields[name] is not None]
    for name in given:
        if task not in TASKS_OF[name]:
            yield name, f"goes with task {' or '.join(TASKS_OF[name])}; with {task} expected none, found {fields[name]}"
    if task == "preference":
        yield from _preference(fields, [name for name in given if task in TASKS_OF[name]])
    if task == "grpo":
        yield from _group(fields)


def _group(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    loss, each = fields["loss"], fields["num_generations"] or 8
    if loss is not None and loss not in GROUP_LOSSES:
        yield "loss", f"expected one of {', '.join(GROUP_LOSSES)} with task grpo; found {loss!r}"
    for name, size in (
        ("per_device_train_batch_size", fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"]),
        ("per_device_eval_batch_size", fields["per_device_eval_batch_size"]),
    ):
        if size % each:
            yield name, f"expected a multiple of the {each} answers to a prompt (num_generations); found {size}"
    for name, neutral, why in (
        ("learning_rate", None, "auto is chosen by a loss of given answers"),
        ("alignment_steps", None, "it compares gradients of a loss of given answers"),
        ("restart_every", None, "a new start is computed from given answers"),
        ("dropout", 0.0, "answers would be sampled from another model than the one that is trained"),
    ):
        value = fields[name]
        if value == "auto" or (name != "learning_rate" and value != neutral):
            yield name, f"does not go with task grpo, as {why}; found {value}"


def _preference(fields: Mapping[str, Any], given: Sequence[str]) -> Iterator[tuple[str, str]]:
    names, weights = losses(fields["loss"]), fields["loss_weights"]
    if unknown := [name for name in names if name not in PREFERENCE_LOSSES]:
        known = ", ".join(PREFERENCE_LOSSES)
        yield "loss", f"expected one of {known}; found {unknown[0]!r}{nearest(unknown[0], PREFERENCE_LOSSES)}"
        return
    kinds = {PREFERENCE_LOSSES[name].kind for name in names}
    if len(names) != 1 and kinds != {"pairs"}:
        yield "loss", f"expected one loss, or several that compare pairs of answers; found {names}"
        return
    kind = kinds.pop()
    for name in given:
        if name not in ("loss", *OPTIONS[kind]):
            yield name, f"is no option of the loss {names[0]}; expected none, found {fields[name]}"
    if weights is not None and len(weights) != len(names):
        yield "loss_weights", f"expected one for each of the {len(names)} losses; found {len(weights)}"
    if "exo_pair" in names and not fields["label_smoothing"]:
        yield "label_smoothing", "expected more than 0 with the loss exo_pair, whose paper takes 0.001; found none"
    if "kto" in names and fields["per_device_train_batch_size"] == 1:
        yield (
            "per_device_train_batch_size",
            "expected 2 at least with the loss kto, which pairs a prompt with another's answer; found 1",
        )
