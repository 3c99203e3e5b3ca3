"""README's picture: losses with their spread, a panel a task, as SVG text that is the same wherever it is drawn."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Losses = Mapping[str, Sequence[tuple[float, float] | None]]  # arm → mean and deviation, task by task

_LABELS, _PANEL, _GAP, _ROW, _TOP = 180, 320, 40, 26, 64
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.small{font-size:11px;fill:#57606a}"
    ".grid{stroke:#d0d7de}.lora{stroke:#0969da;fill:#0969da}.full{stroke:#8c959f;fill:#8c959f}"
)


def picture(title: str, tasks: Sequence[str], losses: Losses) -> str:
    """Each arm's mean as a dot and ± one deviation as a line; further left is better.

    Args:
        tasks: what each panel shows.
    """
    width = _LABELS + len(tasks) * (_PANEL + _GAP)
    height = _TOP + _ROW * len(losses) + 34
    parts = [_text(8, 20, title, "title")]
    parts += [_text(8, _middle(row) + 4, arm) for row, arm in enumerate(losses)]
    for number, task in enumerate(tasks):
        parts += _panel(_LABELS + number * (_PANEL + _GAP), task, [row[number] for row in losses.values()], list(losses))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n"
        f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _panel(left: int, task: str, column: Sequence[tuple[float, float] | None], arms: Sequence[str]) -> list[str]:
    known = [loss for loss in column if loss is not None]
    low, high = min(m - d for m, d in known), max(m + d for m, d in known)
    bottom = _TOP + _ROW * len(column)

    def x(loss: float) -> float:
        return left + 12 + (_PANEL - 24) * (loss - low) / (high - low)

    parts = [_text(left, 44, task, "small")]
    for tick in (low, (low + high) / 2, high):
        parts += [_line(x(tick), _TOP - 8, x(tick), bottom, "grid"), _text(x(tick), bottom + 18, f"{tick:.2f}", "small")]
    for row, (arm, loss) in enumerate(zip(arms, column, strict=True)):
        if loss is not None:
            mean, deviation = loss
            y, kind = _middle(row), "full" if arm.startswith("full") else "lora"
            parts.append(_line(x(mean - deviation), y, x(mean + deviation), y, kind))
            parts.append(f'<circle class="{kind}" cx="{x(mean):.1f}" cy="{y}" r="4.5"/>')
    return parts


def _middle(row: int) -> int:
    return _TOP + _ROW * row + _ROW // 2


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke-width="2"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
