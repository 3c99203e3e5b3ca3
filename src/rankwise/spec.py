"""``LoRA(...)``: what to adapt and how, validated when it is made.

Importing this module needs no torch: a recipe's schema and its errors are made from these fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from rankwise.errors import SpecError
from rankwise.inits import INITS
from rankwise.methods import as_plain, name_of, nearest, resolve
from rankwise.scaling import Scaling
from rankwise.spec_checks import METHOD_FIELDS, check_names, check_together, checked
from rankwise.variants import VARIANTS

if TYPE_CHECKING:
    from rankwise.inits.base import Init
    from rankwise.variants.base import Variant


def option(default: Any, help: str) -> Any:
    """A field with the help text that a recipe's field and its flag have; ``dict`` stands for an empty one."""
    kind = "default_factory" if default is dict else "default"
    return field(**{kind: default}, metadata={"help": help})


@dataclass(frozen=True)
class LoRA:
    """An adapter's specification.

    Attributes:
        rank: r of ΔW = s·B A.
        alpha: numerator of the scale s.
        target_modules: "all-linear" (every linear layer but output heads, those of a new classifier too: name them in
            modules_to_save), a list of module names (a name or its
            last parts), or a regular expression that matches the whole module path.
        exclude_modules: names (or one regular expression) that are left out again.
        init: a name from ``rankwise.inits.INITS``, such as "lora-ga", or an object: ``inits.LoraGA(scale="gd")``.
        scaling: a name from ``rankwise.scaling.SCALINGS``: "lora" s = α/r, "rslora" s = α/√r; or an object.
        variant: a name from ``rankwise.variants.VARIANTS`` or an object from there.
        dropout: probability that an element of the adapter's input is dropped in training.
        rank_pattern, alpha_pattern: per-module values; a key is a regular expression for the last parts of the path.
        modules_to_save: modules trained whole and saved beside the adapter, such as a new classification head.
        anchor: "frozen" keeps W₀ untouched and a frozen copy of a non-zero start; "fold" subtracts the start from the
            base weights instead (r columns a forward instead of 2r; rounding costs what ``attach`` then reports).
        seed: of the random starts; each site derives its own from it and its name.
        trainable_token_indices: ids whose embeddings are trained whole, such as new tokens': a list, of the input
            embedding, or {module's name: list}. An output head that is tied to it follows.
        bias: which biases are trained: "none", "lora_only" those of the adapted layers, "all" every one.
        layers_to_transform: numbers of the layers that "all-linear" or a list of names is meant for; None: all.
        layers_pattern: names of the lists that are so numbered ("layers", "h"); (): the first number in a path.

    Raises:
        SpecError: a field is out of range, unknown, or of the wrong type.

    >>> LoRA(rank=4, init="pissa").to_dict()["init"]
    'pissa'
    """

    rank: int = option(8, "Rank of the adapter.")
    alpha: float = option(16, "Numerator of the adapter's scale.")
    target_modules: str | Sequence[str] = option(
        "all-linear", "Layers to adapt: all-linear, a regular expression, or a list of name endings."
    )
    exclude_modules: str | Sequence[str] = option((), "Layers to leave out.")
    init: "str | Mapping[str, Any] | Init" = option(
        "kaiming", "Initialisation: a name (see `rankwise methods`) or {name: lora-ga, gamma: 16}."
    )
    scaling: str | Mapping[str, Any] | Scaling = option(
        "lora", "Scale of the adapter: lora (alpha/r) or rslora (alpha/sqrt(r))."
    )
    variant: "str | Mapping[str, Any] | Variant" = option("lora", "Kind of adapter (see `rankwise methods`).")
    dropout: float = option(0.0, "Dropout on the adapter's input.")
    rank_pattern: Mapping[str, int] = option(dict, "Ranks that differ, by layer name: {q_proj: 4}.")
    alpha_pattern: Mapping[str, float] = option(dict, "Alphas that differ, by layer name.")
    modules_to_save: Sequence[str] = option(
        (), "Layers trained in full beside the adapter and saved with it; a classifier's head always is."
    )
    anchor: Literal["frozen", "fold"] = option(
        "frozen", "How a non-zero start is cancelled: a frozen copy (exact) or folded into the base."
    )
    seed: int = option(0, "Seed of the initialisation, the data order and dropout.")
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = option(
        None, "Ids of tokens whose embeddings are trained whole: a list, or {module: list}."
    )
    bias: Literal["none", "lora_only", "all"] = option(
        "none", "Biases to train: none, lora_only (adapted layers), all."
    )
    layers_to_transform: int | Sequence[int] | None = option(None, "Numbers of the layers to adapt; default: all.")
    layers_pattern: str | Sequence[str] = option((), "Names of the lists of layers that are so numbered.")

    def __new__(cls, *args: Any, **values: Any) -> "LoRA":
        """Refuse what is no field, with the name that it has here where another library calls it so."""
        check_names(values, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for f in fields(self):
            self._freeze(f.name, checked(f.name, getattr(self, f.name)))
        check_together(vars(self))
        for name, table in METHOD_FIELDS.items():
            self._freeze(name, resolve(table, getattr(self, name), name))
        self._check_variant()

    def _freeze(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_variant(self) -> None:
        """Refuse an anchor or an init that does not go with the variant."""
        variant: Any = self.variant
        variant.anchored(self.anchor)
        if not variant.takes_start and not self.has_default_init:
            raise SpecError(
                f"init {name_of(INITS, self.init)!r}: variant {name_of(VARIANTS, variant)!r} has a start of its own; "
                f"leave init out"
            )

    @property
    def has_default_init(self) -> bool:
        """Whether the init is the one that a spec has where none is asked for."""
        return as_plain(INITS, self.init) == LoRA.__dataclass_fields__["init"].default

    def scale(self, rank: int, alpha: float) -> float:
        """s for this rank and alpha."""
        assert isinstance(self.scaling, Scaling)
        return self.scaling(alpha, rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON, YAML) from which :meth:`from_dict` makes an equal spec."""
        methods = {name: as_plain(table, getattr(self, name)) for name, table in METHOD_FIELDS.items()}
        return plain_fields({f.name: getattr(self, f.name) for f in fields(self)} | methods)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "LoRA":
        """The spec that :meth:`to_dict` wrote.

        Raises:
            SpecError: an unknown key (the nearest known one is offered) or a value out of range.
        """
        known = [f.name for f in fields(cls)]
        for key in plain:
            if key not in known:
                raise SpecError(f"unknown key {key!r}, known: {', '.join(known)}{nearest(str(key), known)}")
        return cls(**plain)

    def __reduce__(self) -> Any:
        # A read-only mapping cannot be pickled or deep-copied, its plain form can.
        return LoRA.from_dict, (self.to_dict(),)

    def __hash__(self) -> int:
        return hash(repr(sorted(self.to_dict().items())))


def default_of(spec_field: "Field[Any]") -> Any:
    """The value of a field of :class:`LoRA` that is left out."""
    return spec_field.default if spec_field.default_factory is MISSING else spec_field.default_factory()


def plain_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a spec, its methods by name, as plain data; those that are left out at their defaults."""
    plain = {f.name: values.get(f.name, default_of(f)) for f in fields(LoRA)}
    return {name: plain_value(value) for name, value in plain.items()}


def plain_value(value: Any) -> Any:
    """A field's value as JSON and YAML hold it."""
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
