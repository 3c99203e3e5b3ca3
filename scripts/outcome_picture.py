"""README's picture: losses with their spread, a panel a task, as SVG text that is the same wherever it is drawn."""

from collections.abc import Mapping
from xml.sax.saxutils import escape

Losses = Mapping[str, tuple[float, float]]  # arm → mean and deviation

_LABELS, _WIDTH, _ROW, _HEAD, _FOOT = 110, 640, 22, 34, 30
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.small{font-size:11px;fill:#57606a}"
    ".grid{stroke:#d0d7de;stroke-width:1}.lora{stroke:#0969da;fill:#0969da}.full{stroke:#8c959f;fill:#8c959f}"
)


def picture(title: str, tasks: Mapping[str, Losses]) -> str:
    """Each arm's mean as a dot and ± one deviation as a line; further left is better."""
    parts, top = [_text(10, 22, f"{title} (further left is better)", "title")], 32
    for task, losses in tasks.items():
        parts += _panel(top, task, losses)
        top += _HEAD + _ROW * len(losses) + _FOOT
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n"
        f'<rect width="{_WIDTH}" height="{top}" rx="6" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _panel(top: int, task: str, losses: Losses) -> list[str]:
    low, high = min(m - d for m, d in losses.values()), max(m + d for m, d in losses.values())
    first, bottom = top + _HEAD, top + _HEAD + _ROW * len(losses)

    def x(loss: float) -> float:
        return _LABELS + 20 + (_WIDTH - _LABELS - 50) * (loss - low) / (high - low)

    parts = [_text(10, top + 20, task, "small")]
    for tick in (low, (low + high) / 2, high):
        parts += [
            _line(x(tick), first - 4, x(tick), bottom, "grid"),
            _text(x(tick) - 12, bottom + 14, f"{tick:.2f}", "small"),
        ]
    for row, (arm, (mean, deviation)) in enumerate(losses.items()):
        y, kind = first + _ROW * row + _ROW // 2, "full" if arm.startswith("full") else "lora"
        parts += [_text(10, y + 4, arm), _line(x(mean - deviation), y, x(mean + deviation), y, kind)]
        parts.append(f'<circle class="{kind}" cx="{x(mean):.1f}" cy="{y}" r="4.5"/>')
    return parts


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke-width="2"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
