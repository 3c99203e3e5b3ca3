"""Whether an adapter was trained on chats, beside it: what answers with it then asks through the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import BrokenFile
from rankwise.files import read_limited
from rankwise.json_object import as_json

_FILE = "trained_on.json"
_FORMS = ("chats", "text")


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a sample is a conversation, or asks with one."""
    return "messages" in row or isinstance(row.get("prompt"), list)


def save_form(adapter: Path, *, chats: bool) -> None:
    """Write which it was."""
    (adapter / _FILE).write_text(json.dumps({"form": _FORMS[0] if chats else _FORMS[1]}) + "\n", encoding="utf-8")


def trained_on_chats(adapter: Path) -> bool:
    """Whether the adapter says that it was; one that says nothing was not.

    Raises:
        BrokenFile: what it says is not understood.
    """
    path = adapter / _FILE
    if not path.is_file():
        return False
    content = as_json(str(path), read_limited(path))
    if not isinstance(content, dict) or content.get("form") not in _FORMS:
        raise BrokenFile(f"{path}: expected a `form`, one of {', '.join(_FORMS)}, found {content!r}")
    return bool(content["form"] == _FORMS[0])
