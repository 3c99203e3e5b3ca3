"""α/r^¾: half way, on a logarithmic scale, between LoRA's scale and rsLoRA's."""

from dataclasses import dataclass

from rankwise.scaling import Scaling


@dataclass(frozen=True)
class ThreeQuarters(Scaling):
    """α/r^¾."""

    def __call__(self, alpha: float, rank: int) -> float:
        return alpha / rank**0.75
