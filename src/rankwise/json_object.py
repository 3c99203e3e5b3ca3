"""JSON from strangers: an object, each key once, only text that can be written again."""

import json
from typing import Any

from rankwise.errors import BrokenFile


def as_object(where: str, content: bytes) -> dict[str, Any]:
    """The object that some bytes spell.

    Args:
        where: what stands before the message of an error.

    Raises:
        BrokenFile: not UTF-8, not JSON, not an object, a key twice in one object, or half of a surrogate pair.
    """
    found = as_json(where, content)
    if not isinstance(found, dict):
        raise BrokenFile(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found


def as_json(where: str, content: bytes) -> Any:
    """Like :func:`as_object`, for any kind of value."""
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BrokenFile(f"{where}: half of a surrogate pair, which is no text ({error})") from None
    except (ValueError, RecursionError) as error:  # whole numbers of thousands of digits are ValueErrors too
        raise BrokenFile(f"{where}: not valid JSON ({error})") from None
    except _Duplicate as error:
        raise BrokenFile(f"{where}: the key {error.args[0]!r} appears twice in one object") from None
    return found


class _Duplicate(Exception):
    pass


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise _Duplicate(key)
        found[key] = value
    return found
