"""The bands of a run as heat maps, a PNG: layer x head and layer x position band, every value printed (no torch).

Pillow and not matplotlib: TensorBoard has brought it already, and a grid of numbers needs no more.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_atomically
from .records import BandsOf, bands_path, picture_path, read_bands

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

TITLES = {
    "linear_share": "linear branch's share of the normaliser, %",
    "output_share": "linear branch's share of the output's norm, %",
    "outside_share": "mass of full softmax outside the window, %",
}
CELL, LABELS, GAP, MARGIN, LINE = (40, 20), 62, 48, 16, 22  # pixels
FULL = (8, 48, 107)  # of 100 %; 0 % is white
FONT = 12


@dataclass(frozen=True)
class Grid:
    """Rows of values in 0..1 with their labels, and what the columns are."""

    title: str
    across: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]

    @property
    def size(self) -> tuple[int, int]:
        """Pixels: two lines of title, a line of columns, then the cells."""
        return LABELS + CELL[0] * len(self.columns), 3 * LINE + CELL[1] * len(self.rows)


def write(run: Path) -> str:
    """Draw the bands of a run's folder beside them, `usage.png`. Returns why there is no picture; empty where there is."""
    path = picture_path(run)
    try:
        content = png(read_bands(run))
    except ModuleNotFoundError as error:
        path.unlink(missing_ok=True)  # of an earlier run: the numbers may be others
        return f"no heat maps: {error.name} is not installed (pip install pillow); the numbers are in {bands_path(run)}"
    write_atomically(path, content)
    return ""


def grids(found: Sequence[BandsOf]) -> tuple[tuple[Grid, Grid], ...]:
    """For each state, suite and metric: layer x head (mean over queries) and layer x band (mean over heads).

    Several seeds of items are averaged. Where a suite measures usage at several lengths, each has its own pair.
    """
    groups: dict[tuple[str, str, str, tuple[int, ...]], dict[int, list[BandsOf]]] = {}
    for each in found:
        layers = groups.setdefault((each.state, each.suite, each.metric, each.edges), {})
        layers.setdefault(int(each.task.removeprefix("layer_")), []).append(each)
    return tuple(_pair(*key, layers) for key, layers in groups.items())


def _pair(
    state: str, suite: str, metric: str, edges: tuple[int, ...], layers: dict[int, list[BandsOf]]
) -> tuple[Grid, Grid]:
    heads, bands = [], []
    for layer, seeds in sorted(layers.items()):
        counts = seeds[0].counts
        mean = [
            [sum(s.heads[h][b] for s in seeds) / len(seeds) for b in range(len(counts))]
            for h in range(len(seeds[0].heads))
        ]
        label = f"layer {layer}"
        by_head = tuple(sum(x * n for x, n in zip(row, counts, strict=True)) / sum(counts) for row in mean)
        heads.append((label, by_head))
        bands.append((label, tuple(sum(row[b] for row in mean) / len(mean) for b in range(len(counts)))))
    title = f"{TITLES[metric]}: {state} ({suite})"
    names = tuple(str(h) for h in range(len(heads[0][1])))
    starts = tuple(f"{e}" for e in edges[:-1])
    across = f"position from (up to the next; the last to {edges[-1] - 1})"
    return Grid(title, "head", names, tuple(heads)), Grid("", across, starts, tuple(bands))


def size_of(pairs: Sequence[tuple[Grid, Grid]], widths: Sequence[int] = ()) -> tuple[int, int]:
    """Pixels of the picture: pairs below each other. `widths`: of texts that may be wider than their grids."""
    width = max([left.size[0] + GAP + right.size[0] for left, right in pairs] + list(widths))
    return 2 * MARGIN + width, 2 * MARGIN + sum(left.size[1] for left, _ in pairs) + GAP // 2 * (len(pairs) - 1)


def png(found: Sequence[BandsOf]) -> bytes:
    """The picture of all grids. Raises ModuleNotFoundError without Pillow."""
    from PIL import Image, ImageDraw, ImageFont

    pairs = grids(found)
    font = ImageFont.load_default(FONT)
    widths = []
    for left, right in pairs:
        widths += [int(font.getlength(left.title)), left.size[0] + GAP + LABELS + int(font.getlength(right.across))]
    image = Image.new("RGB", size_of(pairs, widths), "white")
    draw = ImageDraw.Draw(image)
    y = MARGIN
    for left, right in pairs:
        _draw(draw, font, left, MARGIN, y)
        _draw(draw, font, right, MARGIN + left.size[0] + GAP, y)
        y += left.size[1] + GAP // 2
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _draw(draw: "ImageDraw", font: "FreeTypeFont | ImageFont", grid: Grid, x: int, y: int) -> None:
    wide, high = CELL
    draw.text((x, y), grid.title, "black", font)
    draw.text((x + LABELS, y + LINE), grid.across, "black", font)
    for i, name in enumerate(grid.columns):
        draw.text((x + LABELS + i * wide + wide // 2, y + 2 * LINE + LINE // 2), name, "black", font, anchor="mm")
    for j, (label, values) in enumerate(grid.rows):
        top = y + 3 * LINE + j * high
        draw.text((x, top + high // 2), label, "black", font, anchor="lm")
        for i, value in enumerate(values):
            left = x + LABELS + i * wide
            shade = min(max(value, 0.0), 1.0)
            colour = tuple(round(255 + (c - 255) * shade) for c in FULL)
            draw.rectangle((left, top, left + wide - 2, top + high - 2), colour)
            ink = "black" if shade < 0.5 else "white"
            text = f"{value * 100:.1f}"
            draw.text((left + wide // 2, top + high // 2), text, ink, font, anchor="mm")
