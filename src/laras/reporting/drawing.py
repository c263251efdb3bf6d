"""Figures as SVG inside the page: accessible, in the page's colours, identical for identical data.

matplotlib draws with the light theme's colours; each is then replaced by a variable of the page's style sheet, so
that one drawing serves light, dark and print. Nothing is told by colour alone: lines differ in dash and marker too.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Colour of the light theme → variable of the style sheet.
INK, MUTED, GRID, SURFACE = "#1b1f27", "#5c6470", "#dfe3e9", "#fefefd"
BLUE, ORANGE, GREEN, PURPLE, BROWN, CYAN = "#0b63b0", "#c2500a", "#0a7d55", "#8a3f9e", "#7a5a12", "#1287a8"
RED = "#b3261e"
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", RED: "bad",
    BLUE: "c1", ORANGE: "c2", GREEN: "c3", PURPLE: "c4", BROWN: "c5", CYAN: "c6",
}  # fmt: skip
SERIES_COLORS = (BLUE, ORANGE, GREEN, PURPLE, BROWN, CYAN)
SERIES_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (9, 3)), (0, (3, 1.5, 1, 1.5, 1, 1.5)),
)  # fmt: skip
SERIES_MARKERS = ("o", "s", "^", "D", "v", "P")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "laras",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "path.simplify": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
# Room for a title, between parts, and for a line of the legend.
_TITLE_INCHES, _GAP_INCHES, _LEGEND_LINE_INCHES = 0.26, 0.1, 0.24
# How many times the low end of a logarithmic scale the high end is, and what is named between powers of ten below that:
# at least two values, and no more than stand beside each other in a third of the page.
_LOG_NAMES: tuple[tuple[float, tuple[float, ...]], ...] = ((20, (1, 2, 5)), (200, (1, 3)), (math.inf, (1,)))
_SMALLEST_DECIMAL = 1e-3  # what is smaller is written with a power of ten
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_FONT = re.compile(r"font-family:[^;]*;?|font-variant:[^;]*;?|font-stretch:[^;]*;?")


@dataclass(frozen=True)
class Drawing:
    """One figure of the report.

    Attributes:
        name: Unique in the page; part of every id.
        title: What it shows, in a few words.
        description: What a reader who cannot see it should know.
        svg: The drawing, markup that this module made.
    """

    name: str
    title: str
    description: str
    svg: str


@contextmanager
def drawing_style() -> Iterator[None]:
    """The look of every figure; matplotlib's settings are as before afterwards."""
    with mpl.rc_context(_STYLE):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, height: float = 2.7, share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure of the page's width; `height` in inches of 72 points."""
    figure = Figure(figsize=(9.0, height))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share_x)
    return figure, list(axes.flat)


def finish(figure: Figure, name: str, title: str, description: str) -> Drawing:
    """Turns the figure into SVG that can stand in a page."""
    for _ in range(2):  # in their first places the axes may get other ticks, with wider labels
        _arrange(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ET.fromstring(buffer.getvalue())
    for element in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(element)
    _rename_ids(root, name)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key in ("style", "fill", "stroke"):
                element.set(key, _page_colors(_FONT.sub("", value)))
    root.attrib.pop("version", None)
    for length in ("width", "height"):
        root.attrib.pop(length, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(position, element)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return Drawing(name, title, description, ET.tostring(root, encoding="unicode"))


def _arrange(figure: Figure) -> None:
    """Gives axes of one size each, their titles and labels, and the legend below them their places.

    matplotlib's constrained layout would do the same from several measurements of everything, which takes longer than
    drawing; this measures the labels of each axis, and is called once more for what they are then.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    first = figure.axes[0].get_subplotspec()
    assert first is not None  # `new_figure` has made them
    rows, columns = first.get_gridspec().get_geometry()
    left, above, below = [0.0] * columns, [0.0] * rows, [0.0] * rows  # inches
    places: list[tuple[Axes, int, int]] = []
    for axes in figure.axes:
        spec = axes.get_subplotspec()
        assert spec is not None
        row, column = spec.rowspan.start, spec.colspan.start
        places.append((axes, row, column))
        beside, under = axes.yaxis.get_tightbbox(renderer), axes.xaxis.get_tightbbox(renderer)
        left[column] = max(left[column], (axes.bbox.x0 - beside.x0) / figure.dpi if beside else 0.0)
        below[row] = max(below[row], (axes.bbox.y0 - under.y0) / figure.dpi if under else 0.0)
        above[row] = max(above[row], _TITLE_INCHES if axes.get_title(loc="left") else _GAP_INCHES)
    lines = sum(-(-len(legend.get_texts()) // legend._ncols) for legend in figure.legends)  # type: ignore[attr-defined]
    width, height = figure.get_size_inches()
    wide = (width - sum(left) - _GAP_INCHES * 2 * columns) / columns
    high = (height - sum(above) - sum(below) - _GAP_INCHES * rows - _LEGEND_LINE_INCHES * lines) / rows
    for axes, row, column in places:
        x = sum(left[: column + 1]) + (wide + 2 * _GAP_INCHES) * column + _GAP_INCHES / 2
        y = height - sum(above[: row + 1]) - sum(below[:row]) - (high + _GAP_INCHES) * row - high
        axes.set_position((x / width, y / height, wide / width, high / height))


def step_axis(axes: Axes, label: str = "optimizer step") -> None:
    """Whole steps, with thousands separated."""
    axes.set_xlabel(label)
    low, high = axes.get_xlim()
    if math.floor(high) - math.ceil(low) < 1:  # one step alone; between whole numbers there is nothing to name
        step = round((low + high) / 2)
        axes.set_xlim(step - 1, step + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_scale(axes: Axes, direction: Literal["x", "y"]) -> None:
    """A logarithmic scale that names powers of ten, and in a narrow one values between them."""
    (axes.set_xscale if direction == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if direction == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    names = next(names for ratio, names in _LOG_NAMES if high < ratio * low or ratio == math.inf)
    axis.set_major_locator(LogLocator(subs=names))
    axis.set_major_formatter(PLAIN_TICKS)
    axis.set_minor_formatter(NullFormatter())


def _plain_tick(value: float, _: object = None) -> str:
    if value and abs(value) < _SMALLEST_DECIMAL:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


# `0.05`, `0.001`, `1.5e-4`, `5e-5`: without a common power of ten, which would take the title's place.
PLAIN_TICKS = FuncFormatter(_plain_tick)


def _rename_ids(root: ET.Element, name: str) -> None:
    """Ids that something refers to become unique in the page; the others go."""
    text = ET.tostring(root, encoding="unicode")
    referred = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in referred:
            element.set("id", f"{name}-{identity}")
        for key, value in element.attrib.items():
            if "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
            elif key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")


def _page_colors(style: str) -> str:
    def variable(match: re.Match[str]) -> str:
        color = match[0].lower()
        return f"var(--{_VARIABLES[color]})" if color in _VARIABLES else color

    return _HEX.sub(variable, style).strip()
