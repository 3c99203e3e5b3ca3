"""YAML out of files that may be a stranger's: plain data, each key once, of a size that one can read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from rankwise.errors import BrokenFile, RecipeError
from rankwise.files import read_small

_TEXT_LIMIT = 2**20  # bytes
_VALUES_LIMIT = 100_000  # aliases written out
_DEPTH_LIMIT, _DIGITS_LIMIT = 40, 100


def read_yaml(path: Path, advice: str) -> dict[str, Any]:
    """A file's mapping.

    Args:
        advice: what such a file looks like, for whoever wrote another.

    Raises:
        RecipeError: it cannot be read, or is no mapping.
    """
    try:
        text = read_small(path).decode("utf-8-sig")
    except (BrokenFile, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: expected a readable YAML file, found: {error}.") from None
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: expected YAML, found: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"{values!r:.80} ({type(values).__name__})"
        raise RecipeError(f"{path}: expected `field: value` lines, found {found}. {advice}")
    return values


def parse_yaml(text: str) -> Any:
    """The value that a text spells.

    Raises:
        yaml.YAMLError: it spells none, or one that is too large or too deep.
    """
    if len(text) > _TEXT_LIMIT:
        raise yaml.YAMLError(f"{len(text)} letters; at most {_TEXT_LIMIT} are read")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _VALUES_LIMIT:
            raise yaml.YAMLError(f"aliases that stand for more than {_VALUES_LIMIT} values; write out what is meant")
        return loader.construct_document(node)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # PyYAML's, of a date or number that is none
        raise yaml.YAMLError(f"a value that is not what its tag or form says ({error})") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a node holds, aliases written out; infinitely many if it holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice and reads 2e-4 as a number (YAML 1.1 reads it as text)."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEPTH_LIMIT:
            raise yaml.YAMLError(f"more than {_DEPTH_LIMIT} levels of values in values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _DIGITS_LIMIT:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} digits", node.start_mark
            )
        return super().construct_scalar(node)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in keys:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} is given twice; keep one", key.start_mark
                )
            keys.add((key.tag, key.value))
        return node


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.add_implicit_resolver(_NUMBERS[1], re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
