"""Fill the tables of docs/structures.md from benchmarks/results/zoo.json.

python scripts/structures.py            # rewrite
python scripts/structures.py --check    # exit 1 if it is out of date
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "structures.md"
RESULT = ROOT / "benchmarks" / "results" / "zoo.json"
BEGIN, END = "<!-- zoo: scripts/structures.py -->", "<!-- /zoo -->"


def tables() -> str:
    """The counts, and a row for each architecture that could be built."""
    result = json.loads(RESULT.read_text())
    rows = result["rows"]
    counts = Counter(row["outcome"] for row in rows)
    failed = [row["name"] for row in rows if row["outcome"] == "not built"]
    built = len(rows) - len(failed)
    versions = result["machine"]["versions"]
    lines = [
        f"{len(rows)} architectures of transformers {versions['transformers']}; {built} could be built tiny and run. "
        f"Of those {counts['works']} work ({counts['works'] / built:.1%}), {counts['refused']} are refused by name, "
        f"{counts['wrong']} are wrong.",
        "",
        "| Architecture | Model | | Adapted layers | Left out, or why |",
        "| --- | --- | --- | --- | --- |",
        *(_row(row) for row in rows if row["outcome"] != "not built"),
        "",
        f"Not built ({len(failed)}): {', '.join(failed)}.",
    ]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    notes = Counter(re.sub(r"\.\d+(?=[.,' ])", ".*", note) for note in row["why"].split("; "))
    why = "; ".join(note if count == 1 else f"{count} × {note}" for note, count in notes.items())
    why = why.replace("|", "\\|").replace("*", "\\*")
    return f"| {row['name']} | {row['model']} | {row['outcome']} | {row['sites'] or ''} | {why} |"


def document() -> str:
    """docs/structures.md."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = document()
    if not parser.parse_args().check:
        DOCUMENT.write_text(text)
    elif DOCUMENT.read_text() != text:
        sys.exit("docs/structures.md is out of date; run python scripts/structures.py")


if __name__ == "__main__":
    main()
