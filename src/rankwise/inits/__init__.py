"""Initialisations: which matrix, which of its directions, which scale. One file a method, one row in the table."""

from rankwise.methods import Method, lazy_attributes

INITS: dict[str, Method] = {
    "kaiming": Method(".inits.kaiming:Kaiming", "arXiv 2106.09685", "A uniform random, B = 0: the default"),
    "gaussian": Method(".inits.gaussian:Gaussian", "arXiv 2106.09685", "A Gaussian, B = 0: the LoRA paper's text"),
    "init-b": Method(".inits.init_b:InitB", "arXiv 2406.08447", "A = 0, B random: stable, learns features less"),
    "pissa": Method(".inits.pissa:Pissa", "arXiv 2404.02948", "the weight's largest singular directions"),
    "milora": Method(".inits.milora:Milora", "arXiv 2406.09044", "the weight's smallest singular directions"),
    "olora": Method(".inits.olora:Olora", "arXiv 2406.01775", "the weight's QR decomposition"),
    "eva": Method(
        ".inits.eva:Eva",
        "arXiv 2410.07170",
        "the inputs' principal directions, B = 0; ranks go where they explain most",
    ),
    "corda": Method(
        ".inits.corda:Corda", "arXiv 2406.05223", "the weight's singular directions, weighed by the inputs' covariance"
    ),
    "loftq": Method(
        ".inits.loftq:Loftq",
        "arXiv 2310.08659",
        "what quantisation lost: the start is nearer to the full-precision model",
    ),
    "lora-ga": Method(
        ".inits.lora_ga:LoraGA",
        "arXiv 2407.05000",
        "the gradient's singular directions: the first step is the full one's",
    ),
    "lora-one": Method(
        ".inits.lora_one:LoraOne", "arXiv 2502.01235", "one low-rank step of full gradient descent, taken at the start"
    ),
}

__getattr__ = lazy_attributes(__name__, INITS, {"Init": ".inits.base:Init", "Start": ".sites:Start"})
