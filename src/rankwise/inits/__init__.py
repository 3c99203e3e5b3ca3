"""Initialisations: which matrix, which of its directions, which scale. One file a method, one line in the table."""

from rankwise.inits.base import Init
from rankwise.inits.gaussian import Gaussian
from rankwise.inits.init_b import InitB
from rankwise.inits.kaiming import Kaiming
from rankwise.inits.lora_ga import LoraGA
from rankwise.inits.olora import Olora
from rankwise.inits.pissa import Pissa
from rankwise.registry import Entry
from rankwise.sites import Start

INITS: dict[str, Entry] = {
    "kaiming": Entry(Kaiming, "arXiv 2106.09685", "A uniform random, B = 0: the default"),
    "gaussian": Entry(Gaussian, "arXiv 2106.09685", "A Gaussian, B = 0: the LoRA paper's text"),
    "init-b": Entry(InitB, "arXiv 2406.08447", "A = 0, B random: stable, learns features less"),
    "pissa": Entry(Pissa, "arXiv 2404.02948", "the weight's largest singular directions"),
    "olora": Entry(Olora, "arXiv 2406.01775", "the weight's QR decomposition"),
    "lora-ga": Entry(
        LoraGA, "arXiv 2407.05000", "the gradient's singular directions: the first step is the full one's"
    ),
}

__all__ = ["INITS", "Gaussian", "Init", "InitB", "Kaiming", "LoraGA", "Olora", "Pissa", "Start"]
