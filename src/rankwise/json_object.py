"""JSON from strangers: an object, each key once, only text that can be written again."""

import json
from typing import Any

from rankwise.errors import BrokenFile


def as_object(source: str, content: bytes) -> dict[str, Any]:
    """The object that some bytes spell.

    Args:
        source: what stands before the message of an error.

    Raises:
        BrokenFile: not UTF-8, not JSON, not an object, a key twice in one object, or half of a surrogate pair.
    """
    value = as_json(source, content)
    if not isinstance(value, dict):
        raise BrokenFile(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def as_json(source: str, content: bytes) -> Any:
    """Like :func:`as_object`, for any kind of value."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        collected: dict[str, Any] = {}
        for key, value in items:
            if key in collected:
                raise BrokenFile(f"{source}: the key {key!r} appears twice in one object")
            collected[key] = value
        return collected

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BrokenFile(f"{source}: half of a surrogate pair, which is no text ({error})") from None
    except (ValueError, RecursionError) as error:  # whole numbers of thousands of digits are ValueErrors too
        raise BrokenFile(f"{source}: not valid JSON ({error})") from None
    return value
