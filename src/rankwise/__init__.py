"""rankwise: low-rank training that keeps step with full fine-tuning, on a base that is never touched."""

from rankwise import analysis, errors, inits, optim, variants
from rankwise.adapted.merge import merge, unmerge
from rankwise.algebra.low_rank import LowRank
from rankwise.attach import Pair, activate, attach, detach, disabled, pairs, trainable_parameters
from rankwise.errors import RankwiseError
from rankwise.evidence import activations, covariances, gradients, weights
from rankwise.format.save_load import load, save
from rankwise.optim import param_groups
from rankwise.plan import plan
from rankwise.sites import Site
from rankwise.spec import Bottleneck, LoRA

__version__ = "0.1.0"

__all__ = [
    "Bottleneck",
    "LoRA",
    "LowRank",
    "Pair",
    "RankwiseError",
    "Site",
    "activate",
    "activations",
    "analysis",
    "attach",
    "covariances",
    "detach",
    "disabled",
    "errors",
    "gradients",
    "inits",
    "load",
    "merge",
    "optim",
    "pairs",
    "param_groups",
    "plan",
    "save",
    "trainable_parameters",
    "unmerge",
    "variants",
    "weights",
]
