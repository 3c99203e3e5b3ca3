"""The public names of rankwise, imported together; ``rankwise`` itself takes them from here when one is first used."""

from rankwise import algebra, analysis, errors, evidence, inits, optim, variants
from rankwise.adapted.merge import merge, unmerge
from rankwise.algebra.low_rank import LowRank
from rankwise.attaching import activate, attach, detach, disabled, trainable_parameters
from rankwise.errors import RankwiseError
from rankwise.evidence import activations, covariances, gradients, weights
from rankwise.exporting.diagnosis import doctor
from rankwise.exporting.export import export
from rankwise.format.peft import read_adapter as read
from rankwise.format.peft import write_adapter as write
from rankwise.format.save_load import load, save
from rankwise.optim import param_groups
from rankwise.pair import Pair, pairs
from rankwise.planning import plan
from rankwise.quantising import merge_quantised
from rankwise.routing.route import route
from rankwise.short_forms import Bottleneck
from rankwise.sites import Site
from rankwise.spec import LoRA

__all__ = [
    "Bottleneck",
    "LoRA",
    "LowRank",
    "Pair",
    "RankwiseError",
    "Site",
    "activate",
    "activations",
    "algebra",
    "analysis",
    "attach",
    "covariances",
    "detach",
    "disabled",
    "doctor",
    "errors",
    "evidence",
    "export",
    "gradients",
    "inits",
    "load",
    "merge",
    "merge_quantised",
    "optim",
    "pairs",
    "param_groups",
    "plan",
    "read",
    "route",
    "save",
    "trainable_parameters",
    "unmerge",
    "variants",
    "weights",
    "write",
]
