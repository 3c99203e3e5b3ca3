"""``Bottleneck(...)``: a short form of a spec."""

from collections.abc import Sequence

from rankwise.spec import LoRA
from rankwise.spec_checks import checked_rank


def Bottleneck(
    target_modules: str | Sequence[str],
    width: int = 64,
    activation: str = "gelu",
    dropout: float = 0.0,
    exclude_modules: str | Sequence[str] = (),
    seed: int = 0,
) -> LoRA:
    """The spec of a bottleneck adapter: y + up(act(down(y))) on the outputs of the target layers.

    Houlsby 2019 (arXiv 1902.00751) puts one behind each sub-layer's last projection, before the residual sum; see
    :class:`rankwise.variants.bottleneck.BottleneckVariant`.

    Args:
        target_modules: as in :class:`LoRA`; for example ["o_proj", "down_proj"].
        width: of the bottleneck; the spec's rank.
        activation: "gelu", "relu", "silu" or "tanh".
        dropout: probability that an element inside the bottleneck is dropped in training.
        exclude_modules, seed: as in :class:`LoRA`.

    Raises:
        SpecError: a field is out of range, unknown, or of the wrong type.
    """
    return LoRA(
        rank=checked_rank("width", width),
        alpha=width,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        variant={"name": "bottleneck", "activation": activation},
        dropout=dropout,
        seed=seed,
    )
