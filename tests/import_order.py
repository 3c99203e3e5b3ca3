"""The order in which rankwise's modules import each other, and how many lines of code a part may have."""

import ast
import io
import tokenize
from pathlib import Path

# From the bottom up. A module imports only from the rows above its own, never its siblings.
LAYERS = (
    ("errors", "shapes", "other_names"),
    ("json_object", "automaton", "methods"),
    ("tensor_header", "disk", "sites"),
    (
        "files",
        "patterns",
        "base_probe",
        "in_place",
        "placement",
        "weight_reads",
        "text_table",
        "tuning",
        "algebra",
    ),
    ("tensor_files", "grids"),
    ("layers",),
    ("scaling", "foldable", "left_out", "inits", "variants"),
    ("spec_checks", "trained_beside"),
    ("token_rows",),
    ("spec",),
    # What is to be collected is decided from sites alone, so that a plan can show it; collecting runs the model.
    ("adapter", "collection", "short_forms"),
    ("planning", "approximation", "base_weights", "renaming"),
    ("adapted", "combinations"),
    ("pair", "evidence", "format", "routing"),
    ("inspection", "attaching", "squeezing", "combining", "extracting", "quantising"),
    ("optim", "analysis", "reshaping", "exporting"),
    ("report",),
    ("train", "converting", "pushing"),
    ("trials",),
    ("studies", "compare", "sweep"),
    ("serve",),
    ("cli",),
    ("__main__",),
)
LEVEL: dict[str, float] = {module: level for level, modules in enumerate(LAYERS) for module in modules}
# `rankwise/public.py` gathers the core, so it stands between the core and what is built on it.
LEVEL["public"], LEVEL["__init__"] = LEVEL["report"] - 0.6, LEVEL["report"] - 0.5
# The same inside `train`, by its rooms.
TRAIN_ROOMS = (
    *("yaml_text", "shipped", "section", "task_fields", "recipe"),
    *("data", "model", "trainer", "tasks", "learning_rate", "run"),
)

# What an adapter is made of: it is to stay small enough to be read in an afternoon.
HEART = ("algebra.low_rank", "layers", "sites", "spec", "planning", "inits", "variants", "adapted", "pair", "attaching")
HEART_LINES = 2600
FILE_LINES = 350


def order() -> str:
    """The rows as one line of text."""
    return " ← ".join(", ".join(row) for row in LAYERS)


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in empty
        for line in range(token.start[0], token.end[0] + 1)
    }
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)
