"""Rule: one thing that an engine does not read right. Engine: its rules. And the conditions that rules share.

Nothing here needs torch: :func:`rankwise.inspection.inspection.inspect` judges by headers alone.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rankwise.format.names import OWN
from rankwise.inspection.facts import Effect, Finding, Inspection, Remedy, SiteFacts
from rankwise.scaling import declared

HEADS = ("lm_head", "embed_out", "output_projection")
WHOLE_ADAPTER = ("the adapter",)  # what a rule names where it is about no site in particular


@dataclass(frozen=True)
class BaseFacts:
    """What the base's configuration says.

    Attributes:
        model_type: transformers' name for the architecture, such as "llama".
        layers: number of its blocks.
        tied: whether the output head is the embedding.
    """

    model_type: str
    layers: int
    tied: bool


@dataclass(frozen=True)
class Case:
    """An adapter that an engine is to read, and its base where that is known."""

    facts: Inspection
    base: BaseFacts | None = None


Condition = Callable[[Case], Iterable[str]]


@dataclass(frozen=True)
class Rule:
    """What an engine does with some adapters.

    Attributes:
        about: what the adapter has.
        effect: what the engine makes of it as it stands.
        why: how that comes; it ends a sentence that begins with ``about``.
        source: file and function where that is to be read.
        remedy: what an export does about it.
        condition: case → the sites or modules that it is about; nothing where the rule does not apply.
    """

    about: str
    effect: Effect
    why: str
    source: str
    remedy: Remedy
    condition: Condition

    def finding(self, case: Case) -> Finding | None:
        """What the rule says of an adapter; None where it does not apply."""
        sites = tuple(self.condition(case))
        return Finding(self.about, self.effect, self.why, self.source, self.remedy, sites) if sites else None


Format = Literal["peft", "gguf", "ollama", "mlx"]


@dataclass(frozen=True)
class Engine:
    """An engine, as its sources were read.

    Attributes:
        label: its name as its authors write it; in lower case, as ``--for`` takes it.
        version: of the sources that the rules were read in.
        format: what an export writes for it.
        rules: the gravest first.
        note: case → what to know about starting it with an adapter that it reads right; "" if nothing.
        start: how to start it with an export; ``{out}``, ``{base}`` (as a shell takes them), ``{path}`` (the same as
            ``{out}``, as Python does) and ``{rank}`` are filled in.
        start_merged: the same with a merged checkpoint.
    """

    label: str
    version: str
    format: Format
    rules: tuple[Rule, ...]
    note: Callable[[Case], str]
    start: str
    start_merged: str

    def findings(self, case: Case) -> tuple[Finding, ...]:
        """What it does not read right."""
        return tuple(finding for rule in self.rules if (finding := rule.finding(case)))


def own_form(case: Case) -> Iterable[str]:
    """Layers' own state, which only rankwise reads."""
    return WHOLE_ADAPTER if (case.facts.peft_type or "").startswith(OWN) else ()


def adalora(case: Case) -> Iterable[str]:
    """A file of PEFT's AdaLoRA."""
    return WHOLE_ADAPTER if case.facts.peft_type == "ADALORA" else ()


def relative(case: Case) -> Iterable[str]:
    """Pairs relative to a base that PiSSA or OLoRA changed."""
    return WHOLE_ADAPTER if case.facts.relative_to is not None else ()


def dora(case: Case) -> Iterable[str]:
    """DoRA."""
    return _sites(case, lambda site: _stated(case, "variant") == "dora")


def rslora(case: Case) -> Iterable[str]:
    """Rank-stabilised scales."""
    return _sites(case, lambda site: _stated(case, "scaling") == "rslora")


def convolutions(case: Case) -> Iterable[str]:
    """Sites on convolutions."""
    return _sites(case, lambda site: site.kind == "conv2d")


def embeddings(case: Case) -> Iterable[str]:
    """Sites on embeddings."""
    return _sites(case, lambda site: site.kind == "embedding")


def tied_embeddings(case: Case) -> Iterable[str]:
    """Sites on an embedding that is the output head as well."""
    return embeddings(case) if case.base is not None and case.base.tied else ()


def heads(case: Case) -> Iterable[str]:
    """Sites on the output head."""
    return _sites(case, lambda site: last_name(site) in HEADS)


def tied_heads(case: Case) -> Iterable[str]:
    """Sites on an output head that is the embedding as well."""
    return heads(case) if case.base is not None and case.base.tied else ()


def replaced(case: Case) -> Iterable[str]:
    """Modules that are saved whole."""
    return case.facts.replaced


def biases(case: Case) -> Iterable[str]:
    """Biases that were trained."""
    return WHOLE_ADAPTER if _stated(case, "bias", "none") != "none" else ()


def token_rows(case: Case) -> Iterable[str]:
    """Rows of single tokens that were trained."""
    return WHOLE_ADAPTER if _stated(case, "trainable_token_indices") else ()


def other_ranks(case: Case) -> Iterable[str]:
    """Sites whose rank is not the configuration's."""
    return _sites(case, lambda site: site.rank != _stated(case, "rank"))


def mis_scaled(scale: Callable[[int, int, float], float]) -> Condition:
    """Sites of which an engine takes another scale; of rsLoRA, which is a rule of its own, none.

    Args:
        scale: what it makes of a site's own rank, and the configuration's rank and alpha.
    """

    def condition(case: Case) -> Iterable[str]:
        rank, alpha = _stated(case, "rank", 1), _stated(case, "alpha", 1)
        if _stated(case, "scaling") == "rslora":
            return ()
        return _sites(case, lambda site: not math.isclose(site.scale, scale(site.rank, rank, alpha)))

    return condition


def patterns(case: Case) -> Iterable[str]:
    """Sites whose scale is not what the configuration's rank and alpha make, by the formula that it states."""
    formula = declared(_stated(case, "scaling") == "rslora")
    scale = formula(_stated(case, "alpha", 1), _stated(case, "rank", 1))
    return _sites(case, lambda site: not math.isclose(site.scale, scale))


def uneven(case: Case) -> Iterable[str]:
    """Sites whose rank or scale is not the first site's."""
    first = case.facts.sites[0] if case.facts.sites else None
    return _sites(case, lambda site: first is not None and (site.rank, site.scale) != (first.rank, first.scale))


def above(limit: int) -> Condition:
    """Sites of more than ``limit`` ranks."""
    return lambda case: _sites(case, lambda site: site.rank > limit)


def regular_expression(case: Case) -> Iterable[str]:
    """Targets that are a regular expression."""
    targets = _stated(case, "target_modules")
    return WHOLE_ADAPTER if isinstance(targets, str) and targets != "all-linear" else ()


def any_adapter(case: Case) -> Iterable[str]:
    """Any adapter at all."""
    return WHOLE_ADAPTER


def without(name: str, needed: Collection[str]) -> Condition:
    """Sites called ``name`` whose module has no site called as one of ``needed``."""

    def condition(case: Case) -> Iterable[str]:
        paths = {site.name for site in case.facts.sites}
        alone = [path for path in paths if path.rpartition(".")[2] == name]
        return sorted(
            path for path in alone if not paths.issuperset(f"{path.removesuffix(name)}{other}" for other in needed)
        )

    return condition


def last_name(site: SiteFacts) -> str:
    """``model.layers.0.self_attn.q_proj`` → q_proj."""
    return site.name.rpartition(".")[2]


def largest_rank(case: Case) -> int:
    """Of all sites; 0 where there are none."""
    return max((site.rank for site in case.facts.sites), default=0)


def no_note(case: Case) -> str:
    """There is nothing to know."""
    return ""


def _stated(case: Case, field: str, default: Any = None) -> Any:
    return default if case.facts.spec is None else case.facts.spec[field]


def _sites(case: Case, chosen: Callable[[SiteFacts], bool]) -> tuple[str, ...]:
    return tuple(site.name for site in case.facts.sites if chosen(site))
