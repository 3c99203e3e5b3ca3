"""What is compared: a recipe's methods by name, each with the rate at which the search for its best begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.errors import RecipeError
from rankwise.methods import nearest
from rankwise.optim import OPTIMIZERS
from rankwise.train import recipe as recipes
from rankwise.train.recipe import AdapterFields, OptimizerFields, Recipe, ReshapingFields, StartFields
from rankwise.train.yaml_text import read_yaml
from rankwise.trials.full import FULL

Changes = Mapping[str, Any]

# What an arm may change. The rest, data, steps and batches before all, is the same for every arm.
FIELDS = (
    *(name for name in AdapterFields.model_fields if name != "seed"),
    *(name for name in StartFields.model_fields if name != "init_cache"),  # of one seed's gradients
    *OptimizerFields.model_fields,
    *ReshapingFields.model_fields,
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "adam_beta1", "adam_beta2"),
)

PLAIN: dict[str, Any] = {
    "init": "kaiming",
    "scaling": "lora",
    "variant": "lora",
    "optimizer": "adamw",
    **dict.fromkeys(("restart_every", "restart_rank", "ship_rank")),
}
# rsLoRA's is the scale that LoRA-GA's stable start is made for.
LORA_GA: dict[str, Any] = PLAIN | {"init": "lora-ga", "scaling": "rslora"}

# Where a search begins: LoRA's and LoRA-GA's are measured on SmolLM2-135M in short runs, the others set beside them.
FIRST_RATES = {
    "adamw": 2e-3,  # docs/studies.md: 2e-3 on all linear layers
    "lora-plus": 5e-4,  # B's rate is 16 times A's: AdamW's lies between them
    "lora-pro": 2e-4,  # it moves W as full fine-tuning does
    "spectral": 0.03,
    "polora": 0.1,
    "lora-muon": 0.1,
    "scaled-adam": 2e-3,
    "loft": 2e-4,
}
LORA_GA_RATE = 1e-4  # the demo: 6.25e-5

PRESETS: dict[str, dict[str, Changes]] = {
    "best": {
        "LoRA": PLAIN,
        "LoRA-GA": LORA_GA | {"learning_rate": LORA_GA_RATE},
        "PoLoRA": PLAIN | {"optimizer": "polora"},
        "spectral": PLAIN | {"optimizer": "spectral"},
        "spectral from LoRA-GA": LORA_GA | {"optimizer": "spectral"},
        "full, AdamW": {"full": "adamw"},
        "full, Muon": {"full": "muon"},
    },
    "articles": {
        "LoRA": PLAIN,
        "LoRA+": PLAIN | {"optimizer": "lora-plus"},
        "rsLoRA": PLAIN | {"scaling": "rslora", "learning_rate": 1e-3},
        "PiSSA": PLAIN | {"init": "pissa", "learning_rate": 5e-4},
        "LoRA-GA": LORA_GA | {"learning_rate": LORA_GA_RATE},
        "LoRA-GA, sign": LORA_GA | {"init": {"name": "lora-ga", "align": "sign"}, "learning_rate": LORA_GA_RATE},
        "LoRA-GA, Adam": LORA_GA | {"init": {"name": "lora-ga", "align": "adam"}, "learning_rate": LORA_GA_RATE},
        "DoRA": PLAIN | {"variant": "dora"},
        "AdaLoRA": PLAIN | {"variant": "adalora", "learning_rate": 4e-3},
        "LoRA-Pro": PLAIN | {"optimizer": "lora-pro"},
        "full, AdamW": {"full": "adamw"},
    },
}


# What full fine-tuning may change: what goes with its rate.
FULL_FIELDS = (
    *("full", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2"),
)


@dataclass(frozen=True)
class Arm:
    """One contender, at the first rung of its ladder or at another.

    Attributes:
        full: what trains the weights themselves, a name from ``FULL``; None where an adapter is trained.
    """

    name: str
    recipe: Recipe
    full: str | None = None

    def at(self, rate: float, seed: int) -> Arm:
        """The same with another learning rate and seed."""
        return replace(self, recipe=self.recipe.model_copy(update={"learning_rate": rate, "seed": seed}))

    def shorter(self, steps: int, of: int) -> Arm:
        """The same with a schedule of fewer steps; what is counted in steps shrinks with it."""
        recipe = self.recipe
        warmup, every = recipe.warmup_steps, (recipe.restart_every or 0) * steps // of
        changes = {
            "max_steps": steps,
            "warmup_steps": warmup if warmup < 1 else round(warmup * steps / of),  # below 1 a share of them
            "restart_every": every or None,
            "restart_rank": recipe.restart_rank if every else None,
            "ship_steps": recipe.ship_steps * steps // of,
        }
        return replace(self, recipe=recipe.model_copy(update=changes))


def arms_of(recipe: Recipe, changes: Mapping[str, Changes], source: str) -> list[Arm]:
    """The arms that a table of changes makes of a recipe, in its order: the first is what others are measured by.

    Args:
        source: where the table stands, for errors.

    Raises:
        RecipeError: fewer than two arms, a field that arms may not change, a value that no recipe takes.
    """
    if len(changes) < 2:
        raise RecipeError(f"{source}: expected two arms at least, found {len(changes)}: there is nothing to compare")
    return [_arm(recipe, name, fields, f"{source}: arm {name!r}") for name, fields in changes.items()]


def _arm(recipe: Recipe, name: str, changes: Changes, source: str) -> Arm:
    if changes.get("learning_rate") == "auto":
        raise RecipeError(
            f"{source}: learning_rate: expected the number at which the search for the best begins, found auto, which "
            "would choose without comparing; leave it out for the optimizer's own"
        )
    full = changes.get("full")
    if full is None:
        _check_known(changes, FIELDS, source)
        changed = _changed(recipe, changes, source)
        return Arm(name, _at_first_rate(changed, changes), None)
    if full not in FULL:
        raise RecipeError(
            f"{source}: full: expected one of {', '.join(FULL)}, found {full!r}{nearest(str(full), FULL)}"
        )
    _check_known(changes, FULL_FIELDS, source)
    others = {field: value for field, value in changes.items() if field != "full"}
    plain = {**PLAIN, "learning_rate": FULL[full].learning_rate, **others}
    return Arm(name, _changed(recipe, plain, source), full)


def _check_known(changes: Iterable[str], known: Iterable[str], source: str) -> None:
    for field in changes:
        if field not in known:
            raise RecipeError(
                f"{source}: `{field}`: expected one of {', '.join(known)}{nearest(field, known)}; what is not the "
                "method's is the same for every arm and stands in the recipe"
            )


def _changed(recipe: Recipe, changes: Changes, source: str) -> Recipe:
    return recipes.parse({**recipe.model_dump(exclude_defaults=True), **changes}, source=source)


def _at_first_rate(recipe: Recipe, changes: Changes) -> Recipe:
    if "learning_rate" in changes:
        return recipe
    name = recipe.optimizer if isinstance(recipe.optimizer, str) else recipe.optimizer["name"]
    return recipe.model_copy(update={"learning_rate": FIRST_RATES.get(name, OPTIMIZERS[name].learning_rate)})


def presets(recipe: Recipe, name: str) -> list[Arm]:
    """A preset's arms.

    Raises:
        RecipeError: no such preset.
    """
    if name not in PRESETS:
        raise RecipeError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}{nearest(name, PRESETS)}")
    return arms_of(recipe, PRESETS[name], f"preset {name}")


def read_arms(recipe: Recipe, path: Path) -> list[Arm]:
    """The arms of a YAML file: ``name: {field: value, ...}`` lines.

    Raises:
        RecipeError: it cannot be read, or an arm cannot be.
    """
    table = read_yaml(path, "An arm is a line such as `DoRA: {variant: dora}`.")
    for name, changes in table.items():
        if not isinstance(changes, Mapping):
            raise RecipeError(f"{path}: arm {name!r}: expected `field: value` lines, {{}} for none, found {changes!r}")
    return arms_of(recipe, table, str(path))
