"""What a method of combining is: a pure function of several changes of one weight."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Generator

from rankwise.approximation import Change
from rankwise.errors import SpecError


class Combination(ABC):
    """The options of a method (frozen dataclass fields).

    Attributes:
        truncation: whether a rank or an error goes with it: "none" (the result is kept whole), "needed", or "optional"
            (whole where neither is given, as far as factors hold it).
    """

    truncation: ClassVar[Literal["none", "needed", "optional"]] = "optional"

    @abstractmethod
    def __call__(self, changes: Sequence[Change], generator: Generator) -> Change:
        """One change out of several, each multiplied with its adapter's weight already.

        Args:
            changes: of one weight [out, in]: factors where they hold it, else (DoRA) dense.
            generator: derived from (seed, site name), for methods that draw.
        """


def check_density(method: str, density: float) -> None:
    """Refuse a share of entries to keep that is none.

    Raises:
        SpecError: as it says.
    """
    if not 0 < density <= 1:
        raise SpecError(f"method {method!r}: expected a density above 0 and at most 1, found {density!r}")
