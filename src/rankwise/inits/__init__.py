"""Initialisations: which matrix, which of its directions, which scale. One file a method, one line in the table."""

from rankwise.inits.base import Init
from rankwise.inits.corda import Corda
from rankwise.inits.eva import Eva
from rankwise.inits.gaussian import Gaussian
from rankwise.inits.init_b import InitB
from rankwise.inits.kaiming import Kaiming
from rankwise.inits.loftq import Loftq
from rankwise.inits.lora_ga import LoraGA
from rankwise.inits.lora_one import LoraOne
from rankwise.inits.milora import Milora
from rankwise.inits.olora import Olora
from rankwise.inits.pissa import Pissa
from rankwise.methods import Entry
from rankwise.sites import Start

INITS: dict[str, Entry] = {
    "kaiming": Entry(Kaiming, "arXiv 2106.09685", "A uniform random, B = 0: the default"),
    "gaussian": Entry(Gaussian, "arXiv 2106.09685", "A Gaussian, B = 0: the LoRA paper's text"),
    "init-b": Entry(InitB, "arXiv 2406.08447", "A = 0, B random: stable, learns features less"),
    "pissa": Entry(Pissa, "arXiv 2404.02948", "the weight's largest singular directions"),
    "milora": Entry(Milora, "arXiv 2406.09044", "the weight's smallest singular directions"),
    "olora": Entry(Olora, "arXiv 2406.01775", "the weight's QR decomposition"),
    "eva": Entry(Eva, "arXiv 2410.07170", "the inputs' principal directions, B = 0; ranks go where they explain most"),
    "corda": Entry(Corda, "arXiv 2406.05223", "the weight's singular directions, weighed by the inputs' covariance"),
    "loftq": Entry(
        Loftq, "arXiv 2310.08659", "what quantisation lost: the start is nearer to the full-precision model"
    ),
    "lora-ga": Entry(
        LoraGA, "arXiv 2407.05000", "the gradient's singular directions: the first step is the full one's"
    ),
    "lora-one": Entry(LoraOne, "arXiv 2502.01235", "one low-rank step of full gradient descent, taken at the start"),
}

__all__ = [
    "INITS",
    "Corda",
    "Eva",
    "Gaussian",
    "Init",
    "InitB",
    "Kaiming",
    "Loftq",
    "LoraGA",
    "LoraOne",
    "Milora",
    "Olora",
    "Pissa",
    "Start",
]
