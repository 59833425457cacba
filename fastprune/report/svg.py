"""Charts as inline SVG: small, sharp at any size, coloured by the page's style sheet, readable without scripts.

Matplotlib's SVG has fixed colours, so it cannot follow a reader's dark or light theme, and is ten times the size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

SERIES = 8  # colours in page.html: s0 to s7
MOST_POINTS = 400  # of a line: more cannot be seen
SHAPES = ("circle", "square", "triangle", "diamond")
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """An axis from data to pixels.

    Attributes:
        low, high: Ends, ``low < high``; above 0 if ``log``.
        label: What it shows, with its unit.
        log: Logarithmic.
        percent: Values are shares, to be read as percents.
        ticks: False: no numbers.
    """

    low: float
    high: float
    label: str = ""
    log: bool = False
    percent: bool = False
    ticks: bool = True

    @classmethod
    def of(cls, values: Iterable[float], label: str = "", *, pad: float = 0.05, **kwargs: bool) -> Scale:
        """Around all finite values, a little wider."""
        log = kwargs.get("log", False)
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = (math.log10(v) if log else v for v in (min(finite), max(finite)))
        room = pad * (high - low) or (0.1 if log else 0.05 * abs(high) or 0.5)
        low, high = low - room, high + room
        return cls(10**low if log else low, 10**high if log else high, label, **kwargs)

    def share(self, value: float) -> float:
        """Where ``value`` lies between the ends: 0 to 1, or outside."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value) if value > 0 else -math.inf
        return (value - low) / (high - low)

    def marks(self, most: int) -> list[float]:
        """Round values for ticks, about ``most``."""
        if not self.log:
            unit = 100 if self.percent else 1
            return [v / unit for v in _round_values(self.low * unit, self.high * unit, most)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        if last - first >= 2:
            every = math.ceil((last - first + 1) / most)
            return [10.0**e for e in range(first, last + 1, every)]
        steps = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        inside = [v for v in steps if self.low <= v <= self.high]
        return inside if len(inside) >= 2 else _round_values(self.low, self.high, most)

    def texts(self, marks: Sequence[float]) -> list[str]:
        """Their numbers, as short as they can be told apart."""
        for digits in range(3, 12):
            texts = [f"{100 * v:.{digits}g}%" if self.percent else number(v, digits) for v in marks]
            if len(set(texts)) == len(texts):
                break
        return texts


def number(value: float, digits: int = 3) -> str:
    """Short: 12.3k, 4.5M, 0.021."""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.{digits}g}{sign}"
    return f"{value:.{digits}g}"


def _round_values(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(most, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= 0.999 * rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Chart:
    """One picture with two axes.  Things are drawn in the order of the calls; texts are escaped here.

    Args:
        title, description: Read out by screen readers.
        x, y: The axes.
        width, height: Of the drawing, in its own units; the page scales it.
        below: Room under the x axis.
    """

    def __init__(
        self, title: str, description: str, x: Scale, y: Scale, *, width: int = 420, height: int = 270, below: int = 40
    ) -> None:
        self.title, self.description, self.x, self.y = title, description, x, y
        self.width, self.height = width, height
        self.box = (58, 12, width - 12, height - below)  # left, top, right, bottom of what is between the axes
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> Point:
        """Pixels of a point of the data."""
        left, top, right, bottom = self.box
        return left + self.x.share(x) * (right - left), bottom - self.y.share(y) * (bottom - top)

    def add(self, tag: str, css: str, tip: str = "", text: str = "", **attributes: float | str) -> None:
        """One element, with a tooltip."""
        values = "".join(
            f' {key.replace("_", "-")}="{escape(value) if isinstance(value, str) else _px(value)}"'
            for key, value in attributes.items()
        )
        inner = (f"<title>{escape(tip)}</title>" if tip else "") + escape(text)
        self.parts.append(f'<{tag} class="{escape(css)}"{values}' + (f">{inner}</{tag}>" if inner else "/>"))

    def line(self, points: Sequence[Point], css: str, tip: str = "") -> None:
        pixels = [self.at(*p) for p in thinned(points) if all(map(math.isfinite, self.at(*p)))]
        if len(pixels) > 1:
            self.add("polyline", f"line {css}", tip, points=" ".join(f"{_px(x)},{_px(y)}" for x, y in pixels))
        elif pixels:
            self.add("circle", f"dot {css}", tip, cx=pixels[0][0], cy=pixels[0][1], r=2.5)

    def marker(self, x: float, y: float, css: str, shape: str = "circle", tip: str = "", r: float = 4.5) -> None:
        cx, cy = self.at(x, y)
        if not (math.isfinite(cx) and math.isfinite(cy)):
            return
        if shape == "circle":
            self.add("circle", f"mark {css}", tip, cx=cx, cy=cy, r=r)
            return
        corners = {
            "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
            "triangle": ((0, -1.15), (1.05, 0.8), (-1.05, 0.8)),
            "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        }[shape]
        self.add(
            "polygon", f"mark {css}", tip, points=" ".join(f"{_px(cx + r * a)},{_px(cy + r * b)}" for a, b in corners)
        )

    def bar(self, x0: float, x1: float, y0: float, y1: float, css: str, tip: str = "") -> None:
        (left, bottom), (right, top) = self.at(x0, y0), self.at(x1, y1)
        self.add("rect", css, tip, x=left, y=top, width=max(right - left, 0.3), height=max(bottom - top, 0))

    def svg(self, ident: str) -> str:
        """The element; ``ident`` is unique in its page."""
        left, top, right, bottom = self.box
        back, self.parts = self.parts, []
        if self.y.ticks:
            for v, text in zip(marks := self.y.marks(6), self.y.texts(marks), strict=True):
                _, py = self.at(self.x.low, v)
                self.add("line", "grid", x1=left, x2=right, y1=py, y2=py)
                self.add("text", "tick", text=text, x=left - 6, y=py + 3.6, text_anchor="end")
        if self.x.ticks:
            for v, text in zip(marks := self.x.marks(7), self.x.texts(marks), strict=True):
                px, _ = self.at(v, self.y.low)
                self.add("line", "grid", x1=px, x2=px, y1=bottom, y2=bottom + 4)
                self.add("text", "tick", text=text, x=px, y=bottom + 16, text_anchor="middle")
        self.add("line", "axis", x1=left, x2=right, y1=bottom, y2=bottom)
        self.add("text", "label", text=self.x.label, x=(left + right) / 2, y=self.height - 6, text_anchor="middle")
        middle = f"rotate(-90 11 {_px((top + bottom) / 2)})"
        self.add("text", "label", text=self.y.label, x=11, y=(top + bottom) / 2, text_anchor="middle", transform=middle)
        front, self.parts = self.parts, back
        return (
            f'<svg role="img" viewBox="0 0 {self.width} {self.height}" aria-labelledby="{ident}-t {ident}-d">'
            f'<title id="{ident}-t">{escape(self.title)}</title><desc id="{ident}-d">{escape(self.description)}</desc>'
            + "".join(front + back)
            + "</svg>"
        )


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """At most about ``most`` of the points, first and last included; the lowest and highest of each stretch stay."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    stretches = [range(i, min(i + size, len(points))) for i in range(0, len(points), size)]
    stay = {0, len(points) - 1}
    for stretch in stretches:
        stay |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(stay)]


def _px(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") or "0"
