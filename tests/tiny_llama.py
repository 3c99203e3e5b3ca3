"""A model small enough to train in a second, saved as transformers saves one."""

import json
from pathlib import Path

from rankwise.train.model.tiny import save_tiny_llama, tiny_tokenizer

__all__ = ["save_tiny_llama", "tiny_tokenizer", "write_pairs"]


def write_pairs(path: Path) -> None:
    """Forty prompt/completion samples."""
    rows = [{"prompt": f"say {i}: ", "completion": f"{i} is what I say"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
