"""A recipe's run made ready to train: its adapter, or the weights themselves."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor

from rankwise.errors import RecipeError
from rankwise.planning import whole_modules
from rankwise.train.data.dataset import Data
from rankwise.train.recipe import Recipe
from rankwise.train.run import adapter_start, run
from rankwise.train.run.run import Prepared
from rankwise.train.tasks.base import Loaded

SILENT = Console(quiet=True)


def with_adapter(recipe: Recipe, data: Data | None = None) -> Prepared:
    """The run with its adapter at its start.

    Args:
        data: the samples, where they are not the recipe's own.
    """
    prepared = run.check(run.load(recipe, SILENT), SILENT, data=data)
    adapter_start.attach(prepared.loaded, prepared.batches, prepared.trainer.batch_loss, SILENT)
    return prepared


def with_full_weights(recipe: Recipe, data: Data | None = None) -> Prepared:
    """The run with the weights of the recipe's targets trainable, what it trains whole too, and nothing else.

    Raises:
        RecipeError: the weights are not in 32 bits, or the loss needs a base that stays.
    """
    prepared = run.check(run.load(recipe, SILENT), SILENT, data=data)
    if prepared.trainer.refers_to_base:
        raise RecipeError(
            f"`task`: {recipe.task} compares the model with its base, of which full fine-tuning leaves none; leave "
            "full fine-tuning out, or compare on another task"
        )
    trained = [*target_weights(prepared.loaded), *whole_parameters(prepared.loaded)]
    prepared.model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return prepared


def target_weights(loaded: Loaded) -> list[Tensor]:
    """The weights of the layers that the recipe adapts, the full ones of full fine-tuning.

    Raises:
        RecipeError: they are not in 32 bits, in which alone small steps add up.
    """
    weights = {site.name: loaded.model.get_submodule(site.name).get_parameter("weight") for site in loaded.sites}
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise RecipeError(
                f"{name}: full fine-tuning trains the weights themselves, whose small steps need 32 bits; found "
                f"{weight.dtype}. Set dtype: float32 and quantization: none (bf16: true computes in 16 bits), or leave "
                "full fine-tuning out"
            )
    return list(weights.values())


def whole_parameters(loaded: Loaded) -> list[Tensor]:
    """What the recipe trains whole, as a new classification head."""
    modules = whole_modules(loaded.model, loaded.spec.modules_to_save)
    return [parameter for module in modules.values() for parameter in module.parameters()]
