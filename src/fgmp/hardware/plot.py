"""Two figures of ``fgmp hw energy`` as SVG: energy of lanes by cause, and saving with overhead.

Input is the JSON that the command prints; only coordinates are computed here.
"""

from html import escape
from typing import Any

_COLOURS = {
    "logic": "#8fb8de",
    "registers": "#d9a03b",
    "clock": "#d9603b",
    "leakage": "#6b7280",
}
_WIDTH, _LABEL, _BAR = 720, 90, 26


def figures(facts: dict[str, Any]) -> str:
    """One SVG document with both figures."""
    bars, height = _lanes(facts)
    curve = _overhead(facts, height + 30)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height + 270}" '
        f'font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{bars}{curve}</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    """An SVG text element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _lanes(facts: dict[str, Any]) -> tuple[str, int]:
    """Stacked bars, one per lane, with one colour per cause; and their height."""
    most = max(lane["inertial"] for lane in facts["lanes"].values())
    scale = (_WIDTH - _LABEL - 90) / most
    drawn = [_text(0, 14, f"Lanes, {facts['unit']}, glitches included")]
    x = 300.0
    for cause, colour in _COLOURS.items():
        drawn.append(f'<rect x="{x}" y="5" width="10" height="10" fill="{colour}"/>')
        drawn.append(_text(x + 14, 14, cause))
        x += 90
    y = 26
    for name, lane in facts["lanes"].items():
        drawn.append(_text(_LABEL - 8, y + 17, name, "end"))
        x = float(_LABEL)
        for cause, colour in _COLOURS.items():
            width = lane["by_cause"][cause] * scale
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR - 6}" '
                f'fill="{colour}"/>'
            )
            x += width
        drawn.append(_text(x + 6, y + 15, f"{lane['inertial']:.3g}"))
        y += _BAR
    return "".join(drawn), y


def _overhead(facts: dict[str, Any], top: int) -> str:
    """Saving in percent over overhead, in energies of the FP8 lane."""
    curve = [(float(x), y) for x, y in facts["overhead"]["saving_percent"].items()]
    width, height = _WIDTH - _LABEL - 90, 180
    low = min(0.0, *(y for _, y in curve))
    high = max(10.0, *(y for _, y in curve))

    def at(x: float, y: float) -> tuple[float, float]:
        return _LABEL + x / 2 * width, top + 20 + (high - y) / (high - low) * height

    title = "Saving in percent beside energy that no format changes, in FP8 lanes"
    drawn = [_text(0, top, title)]
    points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in curve)
    drawn.append(f'<polyline points="{points}" fill="none" stroke="#d9603b" stroke-width="2"/>')
    for x in (0.0, 0.5, 1.0, 1.5, 2.0):
        px, py = at(x, low)
        drawn.append(_text(px, py + 16, f"{x:g}", "middle"))
    for y in (low, high):
        drawn.append(_text(_LABEL - 8, at(0, y)[1] + 4, f"{y:.0f}%", "end"))
    if "sourced" in facts["overhead"]:
        x, y = facts["overhead"]["sourced"], facts["overhead"]["saving_percent_at_sourced"]
        px, py = at(min(x, 2.0), y)
        drawn.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="#1a1c20"/>')
        drawn.append(_text(px + 8, py - 6, f"buffers as sourced: {x:.2f}, {y:.1f}%"))
    return "".join(drawn)
