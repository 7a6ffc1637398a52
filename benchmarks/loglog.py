"""Plots on two logarithmic axes, as SVG, for the results of benchmarks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SIDE, _MARGIN = 240, 60


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        points: positive x and y.
        across, up: labels of the axes.
        proportional: whether a grey line shows y in proportion to x, through the last point.
    """

    points: Sequence[tuple[float, float]]
    across: str
    up: str
    proportional: bool = True


def document(panels: Sequence[Panel]) -> str:
    """SVG with the panels in rows of two."""
    rows = -(-len(panels) // 2)
    width, height = 2 * (_SIDE + _MARGIN) + 20, rows * (_SIDE + _MARGIN) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        left = _MARGIN + number % 2 * (_SIDE + _MARGIN)
        top = 16 + number // 2 * (_SIDE + _MARGIN)
        parts += [f'<g transform="translate({left} {top})">', *_drawn(panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _drawn(panel: Panel) -> list[str]:
    """Axes in powers of ten, the line, the points."""
    (x0, x1), (y0, y1) = (
        (math.floor(math.log10(min(axis))), math.ceil(math.log10(max(axis))))
        for axis in zip(*panel.points, strict=True)
    )

    def at(x: float, y: float) -> tuple[float, float]:
        right, above = (math.log10(x) - x0) / (x1 - x0), (math.log10(y) - y0) / max(y1 - y0, 1)
        return right * _SIDE, (1 - above) * _SIDE

    parts = [f'<rect width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#999999"/>']
    for power in range(x0, x1 + 1):
        x, _ = at(10.0**power, 10.0**y0)
        label = f'y="{_SIDE + 14}" text-anchor="middle">{10.0**power:,g}</text>'
        parts.append(f'<text x="{x:.1f}" {label}')
    for power in range(y0, y1 + 1):
        _, y = at(10.0**x0, 10.0**power)
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    if panel.proportional:
        last_x, last_y = panel.points[-1]
        start = max(10.0**x0, last_x * 10.0**y0 / last_y)
        (ax, ay), (bx, by) = at(start, last_y * start / last_x), at(last_x, last_y)
        parts.append(
            f'<line x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{by:.1f}" stroke="#bbbbbb"/>'
        )
    for x, y in (at(*point) for point in panel.points):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#0b6e4f"/>')
    middle = _SIDE / 2
    parts.append(f'<text x="{middle}" y="{_SIDE + 32}" text-anchor="middle">{panel.across}</text>')
    turned = f'transform="rotate(-90 -40 {middle})" text-anchor="middle">{panel.up}</text>'
    parts.append(f'<text x="-40" y="{middle}" {turned}')
    return parts
