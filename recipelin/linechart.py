"""Lines with intervals over one axis, a PNG (no torch). Pillow and not matplotlib: TensorBoard has brought it already."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 540), 76, 286, 60, 60  # pixels; RIGHT holds the legend
SHARP = 3  # drawn so many times larger, then made smaller: smooth lines
FONT = 13
# Okabe and Ito (2008): told apart with any colour vision. More lines come round again with another mark.
COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (0, 0, 0),
    (140, 140, 140),
)
DIGEST = "recipelin"  # the text chunk of a picture that says what it was drawn from


@dataclass(frozen=True)
class Point:
    """`low`, `high`: the interval, None where it is not known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """`hollow`: what somebody else measured."""

    label: str
    points: tuple[Point, ...]
    hollow: bool = False


@dataclass(frozen=True)
class Chart:
    """`across`, `up`: what the axes are, with units. `log`: axes with equal steps for equal ratios, of x, y, xy or none."""

    title: str
    across: str
    up: str
    lines: tuple[Line, ...]
    log: str = ""


def png(charts: Sequence[Chart], *, digest: str = "") -> bytes:
    """The charts under each other. `digest` goes into the file, for `digest_of`. Raises ValueError for a chart of no points,
    or of one that a logarithm does not take.
    """
    from PIL import Image, ImageDraw, PngImagePlugin

    width, height = SIZE
    image = Image.new("RGB", (width * SHARP, height * SHARP * len(charts)), "white")
    draw = ImageDraw.Draw(image)
    for number, chart in enumerate(charts):
        _draw(draw, chart, top=number * height)
    image = image.resize((width, height * len(charts)), Image.Resampling.LANCZOS)
    about = PngImagePlugin.PngInfo()
    about.add_text(DIGEST, digest)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=about, optimize=True)
    return out.getvalue()


def digest_of(content: bytes) -> str:
    """What a picture says that it was drawn from; empty if it does not say."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return str(image.info.get(DIGEST, ""))


def ticks(low: float, high: float, *, log: bool) -> tuple[float, ...]:
    """Some four to eight round numbers from low to high: of a logarithm the fewer of each ten the more tens there are."""
    if log:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = (1, 2, 3, 4, 5, 7) if len(tens) < 4 else (1, 2, 5) if len(tens) < 5 else (1,)
        return tuple(x for t in tens for i in every if low <= (x := i * 10.0**t) <= high)
    rough = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(i for i in (1, 2, 5, 10) if i * step >= rough)
    return tuple(i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))


def _scale(values: Sequence[float], first: float, last: float, *, log: bool) -> tuple[Callable[[float], float], Any]:
    """Value -> pixel, and the ticks; a linear axis has 5 % of air at both ends."""
    if log and min(values) <= 0:
        raise ValueError(f"a logarithmic axis takes no {min(values):g}")
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
    of: Callable[[float], float] = math.log10 if log else float
    air = 0.05 * (of(high) - of(low))
    begin, end = of(low) - air, of(high) + air

    def place(value: float) -> float:
        return first + (of(value) - begin) / (end - begin) * (last - first)

    ends = (10.0**begin, 10.0**end) if log else (begin, end)
    return place, ticks(*ends, log=log)


def _draw(draw: "ImageDraw", chart: Chart, *, top: int) -> None:
    from PIL import ImageFont

    points = [p for line in chart.lines for p in line.points]
    if not points:
        raise ValueError(f"{chart.title}: there is no point to draw")
    font, bold = ImageFont.load_default(FONT * SHARP), ImageFont.load_default((FONT + 2) * SHARP)
    width, height = SIZE
    box = (LEFT, top + TOP, width - RIGHT, top + height - BOTTOM)
    x, across = _scale([p.x for p in points], box[0], box[2], log="x" in chart.log)
    ends = [e for p in points for e in (p.y, p.low, p.high) if e is not None and math.isfinite(e)]
    y, up = _scale(ends, box[3], box[1], log="y" in chart.log)

    def at(*values: float) -> tuple[float, ...]:
        return tuple(v * SHARP for v in values)

    def text(where: tuple[float, float], words: str, anchor: str, fill: Any = "black", used: Any = font) -> None:
        draw.text((where[0] * SHARP, where[1] * SHARP), words, fill=fill, font=used, anchor=anchor)

    text((LEFT, top + TOP / 3), chart.title, "lm", used=bold)
    for value in across:
        draw.line(at(x(value), box[1], x(value), box[3]), fill=(232, 232, 232), width=SHARP)
        text((x(value), box[3] + 8), f"{value:,.10g}", "mt")
    for value in up:
        draw.line(at(box[0], y(value), box[2], y(value)), fill=(232, 232, 232), width=SHARP)
        text((box[0] - 8, y(value)), f"{value:,.10g}", "rm")
    draw.rectangle(at(*box), outline=(120, 120, 120), width=SHARP)
    text(((box[0] + box[2]) / 2, box[3] + 32), chart.across, "mt")
    text((box[0], box[1] - 6), chart.up, "lb", fill=(90, 90, 90))
    for number, line in enumerate(chart.lines):
        colour, round_ = COLOURS[number % len(COLOURS)], number < len(COLOURS)
        places = [(x(p.x), y(p.y)) for p in line.points]
        draw.line([v * SHARP for place in places for v in place], fill=colour, width=2 * SHARP, joint="curve")
        for point, (px, py) in zip(line.points, places, strict=True):
            if point.low is not None and point.high is not None and math.isfinite(point.low + point.high):
                draw.line(at(px, y(point.low), px, y(point.high)), fill=colour, width=SHARP)
            _mark(draw, at(px - 4, py - 4, px + 4, py + 4), colour, round_=round_, hollow=line.hollow)
        level = top + TOP + 12 + 22 * number
        draw.line(at(width - RIGHT + 14, level, width - RIGHT + 38, level), fill=colour, width=2 * SHARP)
        mark = at(width - RIGHT + 22, level - 4, width - RIGHT + 30, level + 4)
        _mark(draw, mark, colour, round_=round_, hollow=line.hollow)
        text((width - RIGHT + 46, level), line.label, "lm")


def _mark(
    draw: "ImageDraw", box: tuple[float, ...], colour: tuple[int, int, int], *, round_: bool, hollow: bool
) -> None:
    fill = (255, 255, 255) if hollow else colour
    (draw.ellipse if round_ else draw.rectangle)(box, fill=fill, outline=colour, width=2 * SHARP)
