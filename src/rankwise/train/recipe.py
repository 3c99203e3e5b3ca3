"""The recipe: everything that decides a run, in one YAML file whose every field is also a flag.

The sections below are the schema, its help text and its defaults. Field names follow transformers and
PEFT, because those are what users have in their fingers; the adapter's fields are made from those of
`rankwise.LoRA`, the training fields are handed to transformers' trainer word for word.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, create_model, field_validator

from rankwise.errors import RecipeError, SpecError
from rankwise.methods import row
from rankwise.optim import OPTIMIZERS
from rankwise.other_names import RUN, hint
from rankwise.spec import LoRA, plain_fields
from rankwise.spec_checks import METHOD_FIELDS, checked
from rankwise.train.section import Method, Positive, Rate, Section, Share, UserPath
from rankwise.train.shipped import located
from rankwise.train.task_fields import AnswerFields, GroupFields, PreferenceFields, misplaced
from rankwise.train.yaml_text import parse_yaml, read_yaml

DataFormat = Literal[
    "auto",
    "messages",
    "sharegpt",
    "prompt-completion",
    "text",
    "alpaca",
    "classification",
    "preference",
    "unpaired-preference",
    "prompt",
]


class ModelFields(Section):
    """Model"""

    model: UserPath = Field(
        description="Base model: a directory, a hub name in your cache, or smollm2-135m, minilm-l6 (built in)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the base weights; auto keeps the model's own."
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="Keep the base in 4 bits (QLoRA) or 8 bits; needs bitsandbytes."
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value)

    task: Literal["causal-lm", "classification", "preference", "seq2seq", "grpo"] = Field(
        "causal-lm", description="What the model is trained for."
    )


class DataFields(Section):
    """Data"""

    data: UserPath | list[UserPath] = Field(
        description="Training data: a file or several (JSON, CSV, parquet ...), or built in: kjv, kjv-pairs ..."
    )
    data_format: DataFormat = Field("auto", description="Shape of the samples; auto reads it off the column names.")
    trained_turns: Literal["all", "last"] = Field(
        "all", description="Which of the assistant's messages in a conversation are learnt: all, or the last."
    )
    eval_data: UserPath | list[UserPath] | None = Field(None, description="Held-out data, same kinds as `data`.")
    eval_split: Share | Positive | None = Field(
        None, description="Without eval_data: the share (0.05) or number (200) of samples to hold out."
    )
    max_train_samples: Positive | None = Field(None, description="Use only this many training samples.")
    max_eval_samples: Positive | None = Field(None, description="Use only this many held-out samples.")
    max_length: Positive | None = Field(1024, description="Longer samples are cut to this many tokens.")


def _recipe_type(name: str, annotation: Any) -> Any:
    """The type of a recipe's field: the spec's, in the kinds of value that a YAML file can hold."""
    if name in METHOD_FIELDS:
        return Method
    if name == "seed":
        return Annotated[int, Field(ge=0, lt=2**32)]  # it seeds libraries too that take no other
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is UnionType:
        return reduce(or_, (_recipe_type("", argument) for argument in arguments))
    kinds: dict[Any, Any] = {Sequence: list, Mapping: dict}
    return kinds[origin][arguments] if origin in kinds else annotation


if TYPE_CHECKING:

    class AdapterFields(Section):
        """What a run itself reads of the adapter."""

        rank: int
        target_modules: str | list[str]
        exclude_modules: str | list[str]
        init: Method
        variant: Method
        modules_to_save: list[str]
        seed: int

else:
    AdapterFields = create_model(
        "AdapterFields",
        __base__=Section,
        __doc__="Adapter",
        **{
            field.name: (
                _recipe_type(field.name, field.type),
                Field(plain_fields({})[field.name], description=field.metadata["help"]),
            )
            for field in fields(LoRA)
        },
    )


class StartFields(Section):
    """Initialisation"""

    init_batches: Positive = Field(
        8, description="Batches of training data shown to an initialisation that reads gradients or activations."
    )
    init_method: Literal["auto", "exact", "sketch"] = Field(
        "auto", description="How it reads gradients: exact, sketch (little memory), auto (exact where they fit)."
    )
    init_memory: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GiB that exact gradients may take at a time; default 2."
    )
    init_cache: UserPath | None = Field(
        None, description="File that keeps the gradients, for runs with the same weights, batches and settings."
    )


class ReshapingFields(Section):
    """Ranks over a run"""

    restart_every: Positive | None = Field(
        None, description="Steps after which what was learnt is kept as it is and the pairs start anew on top."
    )
    restart_rank: Positive | None = Field(
        None, description="With restart_every: the rank that what is kept is cut to; default: none of it is cut."
    )
    ship_rank: Positive | None = Field(
        None,
        description="Train at `rank`, and end with the nearest adapter of this lower rank (train wide, ship narrow).",
    )
    ship_steps: int = Field(
        8, ge=0, description="With ship_rank: how many of the run's steps, its last, the narrow adapter is trained for."
    )


class AnalysisFields(Section):
    """Analysis"""

    alignment_steps: Positive | None = Field(
        None, description="Steps between two looks at how far the adapter's step agrees with full fine-tuning's."
    )
    beside: UserPath | None = Field(
        None, description="Directory of an earlier run, to be shown beside this one on its page."
    )


class OptimizerFields(Section):
    """Optimizer"""

    optimizer: Method = Field(
        "adamw", description="Optimizer: a name (see `rankwise methods`) or {name: lora-plus, ratio: 16}."
    )


def _own_learning_rate(fields: Mapping[str, Any]) -> float:
    """The optimizer's. One that no table has is refused later, whatever its rate."""
    optimizer: Method = fields["optimizer"]
    name = optimizer if isinstance(optimizer, str) else optimizer.get("name")
    return OPTIMIZERS[name if isinstance(name, str) and name in OPTIMIZERS else "adamw"].learning_rate


class TrainingFields(Section):
    """Training"""

    output_dir: UserPath = Field("rankwise-run", description="Directory of the run: checkpoints, adapter, report.")
    learning_rate: Rate | Literal["auto"] = Field(
        default_factory=_own_learning_rate,
        description="Peak learning rate; auto: from rules and a short probe; default: the optimizer's own.",
    )
    rate_probe_steps: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Optimizer steps that auto may take in all; default: 15 % of the run's, 80 to 160."
    )
    per_device_train_batch_size: Positive = Field(8, description="Samples a step and device.")
    per_device_eval_batch_size: Positive = Field(8, description="Samples an evaluation step and device.")
    gradient_accumulation_steps: Positive = Field(1, description="Batches added up before an optimizer step.")
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the data; max_steps overrides it.")
    max_steps: Positive | Literal[-1] = Field(-1, description="Optimizer steps; -1 leaves it to num_train_epochs.")
    lr_scheduler_type: str = Field("linear", description="Learning-rate schedule: linear, cosine, constant ...")
    warmup_steps: float = Field(0, ge=0, description="Steps of warm-up; below 1, a share of all steps.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay: pulls towards the pretrained model.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0 turns it off.")
    optim: str = Field(
        "adamw_torch", description="What steps with optimizer adamw or lora-plus, by its transformers name."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="First-moment decay of Adam, with adamw or lora-plus.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Second-moment decay of Adam, with adamw or lora-plus.")
    bf16: bool = Field(False, description="bfloat16 mixed precision.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    logging_steps: Positive = Field(10, description="Steps between two logged losses.")
    eval_steps: Positive | None = Field(None, description="Steps between two evaluations; default: once an epoch.")
    save_steps: Positive = Field(500, description="Steps between two checkpoints.")
    save_total_limit: Positive | None = Field(None, description="Keep only this many valid checkpoints.")
    report_to: str | list[str] = Field("none", description="Where to report: none, tensorboard, wandb ...")
    resume_from_checkpoint: bool | UserPath | None = Field(
        None, description="true: the newest valid checkpoint in output_dir; or a checkpoint directory."
    )
    resume_anyway: bool = Field(False, description="Resume although the recipe, data, machine or versions changed.")
    dataloader_num_workers: int = Field(0, ge=0, description="Processes that load data.")


SECTIONS: tuple[type[Section], ...] = (
    ModelFields,
    DataFields,
    PreferenceFields,
    GroupFields,
    AnswerFields,
    AdapterFields,
    StartFields,
    OptimizerFields,
    TrainingFields,
    ReshapingFields,
    AnalysisFields,
)


class Recipe(
    AnalysisFields,
    ReshapingFields,
    TrainingFields,
    OptimizerFields,
    StartFields,
    AdapterFields,
    AnswerFields,
    GroupFields,
    PreferenceFields,
    DataFields,
    ModelFields,
):
    """A whole run.

    >>> Recipe(model="smollm2-135m", data="kjv", rank=16).rank
    16
    """

    @property
    def peak_learning_rate(self) -> float:
        """``learning_rate`` as a number.

        Raises:
            RecipeError: it is auto, and no run has chosen one.
        """
        if self.learning_rate == "auto":
            raise RecipeError(
                "`learning_rate`: auto is chosen by a run of its own before its first step; expected a number here, "
                "from which a search may begin"
            )
        return self.learning_rate

    @property
    def data_name(self) -> str:
        """What the training data is called: the names of its files, without their endings."""
        sources = [self.data] if isinstance(self.data, str) else self.data
        return ", ".join(Path(source).name.partition(".")[0] for source in sources)

    @property
    def memory_budget(self) -> int | None:
        """``init_memory`` in bytes."""
        return None if self.init_memory is None else int(self.init_memory * 2**30)

    @property
    def reshapes(self) -> bool:
        """Whether the pairs have other shapes at the run's end than at its start."""
        return self.restart_every is not None or self.ship_rank is not None

    def section(self, fields: type[Section]) -> dict[str, Any]:
        """The values of one section, as plain data."""
        return {name: getattr(self, name) for name in fields.model_fields}


def load(path: Path | None, flags: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe's file, or one that comes with rankwise, if there is one; the command line's flags win over it."""
    flags = flags or {}
    values = {} if path is None else read_yaml(located(path), _SHORTEST)
    recipe = parse({**values, **flags}, dict.fromkeys(flags, "command line"), str(path or "command line"))
    for name, (beside, is_there) in _READ_BESIDE.items():
        if name in recipe.model_fields_set and not is_there(recipe):
            raise RecipeError(
                f"`{name}`: nothing reads it here; expected `{beside}` beside it. Add that, or drop this."
            )
    return recipe


# Fields that only mean something beside another.
_READ_BESIDE: Mapping[str, tuple[str, Callable[[Recipe], bool]]] = {
    "ship_steps": ("ship_rank", lambda recipe: recipe.ship_rank is not None),
    "restart_rank": ("restart_every", lambda recipe: recipe.restart_every is not None),
    "rate_probe_steps": ("learning_rate: auto", lambda recipe: recipe.learning_rate == "auto"),
}


def parse(values: Mapping[str, Any], sources: Mapping[str, str] | None = None, source: str = "recipe") -> Recipe:
    """Validate plain data; `sources` (by field) and `source` (for the rest) name where it came from."""
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        problems = _problems(error, sources or {}, source)
    else:
        problems = list(_out_of_range(recipe, sources or {}, source))
    if problems:
        raise RecipeError("\n".join(problems)) from None
    return recipe


def _out_of_range(recipe: Recipe, sources: Mapping[str, str], source: str) -> Iterator[str]:
    """What the adapter's spec, the tables of methods and the task would refuse."""
    checks = dict.fromkeys(AdapterFields.model_fields, checked) | {"optimizer": _check_optimizer}
    for name, check in checks.items():
        try:
            check(name, getattr(recipe, name))
        except SpecError as error:
            yield f"{sources.get(name, source)}: {error}"
    for name, problem in misplaced(recipe.__dict__):
        yield f"{sources.get(name, source)}: `{name}`: {problem}."


def _check_optimizer(name: str, value: Method) -> None:
    row(OPTIMIZERS, value if isinstance(value, str) else value.get("name"), name)


def flag_value(name: str, text: str) -> Any:
    """A flag's text as the value it would be in the YAML file (text fields are taken as they are)."""
    if Recipe.model_fields[name].annotation is str:
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        if name in ("data", "eval_data") and not text.startswith("["):
            return text  # a file's name
        flag = "--" + name.replace("_", "-")
        raise RecipeError(f"{flag}: expected a YAML value, found {text!r} ({_first_line(error)}).") from None


_SHORTEST = "The shortest recipe has two lines: `model: smollm2-135m` and `data: kjv`."


def _problems(error: ValidationError, sources: Mapping[str, str], source: str) -> list[str]:
    """One line a field: where, what was expected, what was found, what to do."""
    by_field: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "default_factory_not_called":  # a default that follows from a field that is at fault
            continue
        by_field.setdefault(str(item["loc"][0]), []).append(item)
    return [_problem(name, items, sources.get(name, source)) for name, items in by_field.items()]


def _problem(name: str, items: list[Any], source: str) -> str:
    kind = items[0]["type"]
    if name == "lr_ratio":
        option = f"optimizer: {{name: lora-plus, ratio: {items[0]['input']}}}"
        return f"{source}: `lr_ratio` is an option of the optimizer lora-plus; write `{option}`."
    if kind == "extra_forbidden":
        return f"{source}: `{name}` is not a field of a recipe{hint(name, RUN) or _nearest(name)}"
    if kind == "missing":
        about = Recipe.model_fields[name].description
        return f"{source}: `{name}` is missing. {about}"
    # A union reports one error per member; what was found is the same, what was expected adds up.
    expected = " or ".join(dict.fromkeys(_expectation(item["msg"]) for item in items))
    return f"{source}: `{_place(items)}`: expected {expected}; found {_describe(items[0]['input'])}."


def _place(items: list[Any]) -> str:
    """The field, with the key inside it where a mapping's or list's value is the one at fault."""
    loc = items[0]["loc"]
    inner = [str(part) for part in loc[1:2] if len(items) == 1]
    return ".".join([str(loc[0]), *inner])


def _expectation(message: str) -> str:
    return message.removeprefix("Input should be ").removeprefix("Value error, ")


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, Recipe.model_fields, n=1, cutoff=0.5)
    return f". Did you mean `{close[0]}`?" if close else ". `rankwise train --help` lists the fields."


def _describe(value: object) -> str:
    return "nothing" if value is None else f"{value!r:.200} ({type(value).__name__})"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
