"""Figures side by side as a picture: bars on a logarithmic scale, in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

import msgspec

_WIDTH, _MARGIN, _BAR, _GAP = 480, 16, 16, 6
_NAMES, _VALUES = 120, 110
_OWN, _OTHER, _TEXT, _PALE = "#0b7285", "#adb5bd", "#212529", "#868e96"


class Panel(msgspec.Struct, frozen=True):
    """One figure, of all that are compared."""

    title: str
    unit: str
    values: dict[str, float]


def draw(panels: Sequence[Panel], ours: str) -> str:
    """Two panels side by side. `ours` is the name that the others are compared with."""
    height = _MARGIN * 3 + max(len(panel.values) for panel in panels) * (_BAR + _GAP) + 18
    rows = math.ceil(len(panels) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH * 2}" height="{rows * height}" '
        f'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number % 2 * _WIDTH},{number // 2 * height})">')
        parts += _panel(panel, ours)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, ours: str) -> list[str]:
    top = _MARGIN * 2
    lines = [
        _text(_MARGIN, top, panel.title, size=14),
        _text(_WIDTH - _MARGIN, top, "less is better, log scale", "end", _PALE),
    ]
    own = panel.values[ours]
    for number, (name, value) in enumerate(panel.values.items()):
        y = top + 14 + number * (_BAR + _GAP)
        length = _length(value, panel.values.values())
        colour = _OWN if name == ours else _OTHER
        label = f"{value:,.0f} {panel.unit}" if abs(value) >= 10 else f"{value:.1f} {panel.unit}"
        if name != ours and own > 0 and value > 0:
            label += f" ({value / own:.2g}×)" if value / own < 100 else f" ({value / own:,.0f}×)"
        lines += [
            _text(_NAMES, y + 12, name, "end"),
            f'<rect x="{_NAMES + 8}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2" fill="{colour}"/>',
            _text(_NAMES + 14 + length, y + 12, label),
        ]
    return lines


def _length(value: float, values: Iterable[float]) -> float:
    """Of a bar. Logarithmic, from a third of the least value on; at least a sliver, for what cannot be told from 0."""
    positive = [each for each in values if each > 0]
    if value <= 0 or not positive:
        return 1.0
    least, most = min(positive) / 3, max(positive)
    room = _WIDTH - _NAMES - _VALUES - 14 - _MARGIN
    return room * math.log(value / least) / math.log(most / least)


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = _TEXT, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">{escape(text)}</text>'
