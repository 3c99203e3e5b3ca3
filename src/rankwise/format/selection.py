"""Which modules a configuration adapts: by their names, as PEFT chooses them. Tensors of others PEFT leaves aside."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import SpecError, TargetError, UnexpectedTensor, UnsupportedAdapter
from rankwise.format.names import CONFIG, TENSORS
from rankwise.patterns import ends_of, in_layers, keys_under, matching


@dataclass(frozen=True)
class Selection:
    """What a configuration says of the modules that carry its adapter.

    Attributes:
        source: the configuration's file, for errors.
        targets: ends of names, a regular expression for whole names, or "all-linear".
        excluded: ends of names, or a regular expression, of those left out again.
        whole: names of modules trained whole; nothing in them is adapted.
        layers: numbers of the layers that a list of targets is meant for; () for all.
        layers_pattern: names of the lists that are so numbered; () for any.
    """

    source: Path
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    whole: tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]

    @property
    def by_ends_alone(self) -> bool:
        """Whether the targets say all, as names: nothing narrows them."""
        return isinstance(self.targets, tuple) and not (self.excluded or self.layers)

    def chosen(self, paths: Collection[str]) -> set[str]:
        """Those of some module paths that are adapted; of "all-linear", whatever kind of module they are.

        Raises:
            SpecError: a regular expression is none, or takes too long.
        """
        everything = set(paths)
        targeted = everything if self.targets == "all-linear" else self._named("target_modules", self.targets, paths)
        if self.layers:
            targeted = in_layers(targeted, self.layers, self.layers_pattern, self.targets)
        return targeted - self._named("exclude_modules", self.excluded, paths) - set(keys_under(self.whole, paths))

    def _named(self, field: str, names: str | tuple[str, ...], paths: Collection[str]) -> set[str]:
        if isinstance(names, tuple):
            ends = set(names)
            return {path for path in paths if not ends.isdisjoint(ends_of(path))}
        try:
            return matching(field, names, list(paths))
        except TargetError as error:
            raise SpecError(f"{self.source}: {error}") from None

    def check(self, paths: Collection[str]) -> None:
        """Refuse a file that has tensors for a module which the configuration does not choose.

        Raises:
            UnexpectedTensor: as it says. SpecError: see :meth:`chosen`.
        """
        strays = sorted(set(paths) - self.chosen(paths))
        if strays:
            raise UnexpectedTensor(
                f"{self.source.with_name(TENSORS)}: has tensors for {strays[0]} ({len(strays)} such modules), which "
                f"{CONFIG} does not select, so PEFT would leave them aside; expected those of the selected modules "
                f"only: name the module in target_modules, or take the tensors out"
            )


def stated_selection(source: Path, config: Mapping[str, Any], fields: Mapping[str, Any]) -> Selection:
    """What a configuration selects.

    Args:
        source: the file, for errors.
        fields: what it states beside, see :func:`rankwise.format.configuration.stated_fields`.

    Raises:
        SpecError: the numbers of layers, or the names of their lists, cannot be used.
        UnsupportedAdapter: it names no targets.
    """
    targets, layers = fields["target_modules"], fields["layers_to_transform"]
    if not config.get("target_modules"):
        raise UnsupportedAdapter(
            f"{source}: target_modules is {config.get('target_modules')!r}, which leaves it to PEFT to choose by the "
            f"model's architecture; expected the names of the modules that the file has tensors for: write them there"
        )
    if layers and isinstance(targets, str):
        raise SpecError(f"{source}: layers_to_transform goes with a list of target_modules, found {targets!r}")
    excluded, whole = fields["exclude_modules"], fields["modules_to_save"]
    return Selection(source, targets, excluded, whole, layers or (), fields["layers_pattern"])
