"""Style of all figures: they are small enough to be read on a phone, and readable without colour."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can tell apart. Markers and line styles repeat the difference."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 3)), (0, (1, 1)))
GREY = "#8a8a8a"
LEGEND_WIDTH = 60
"""Largest width in characters of a legend that fits under a panel."""

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    # Text is stored as text and not as paths: it can be searched and read aloud, and takes a tenth of the bytes.
    "svg.fonttype": "none",
    # A fixed salt gives equal figures equal IDs, so that the same sweep gives the same page.
    "svg.hashsalt": "msae_sweep",
}


@dataclass(frozen=True)
class Drawing:
    """A figure with a sentence that says what to read from it."""

    name: str
    """Stem of its file names, e.g. `r2_by_k_block5`."""
    title: str
    reading: str
    """Sentence that says what to read from the figure."""
    svg: str
    """SVG to be embedded in a page: without width and height, and with IDs that no other figure has."""
    svg_file: bytes
    png_file: bytes


Job = Callable[[], Drawing | None]
"""Picklable function that draws one figure, or returns None if there is nothing to draw."""
Draw = Callable[[Sequence[Job]], Callable[[], list[Drawing | None]]]
"""Function that starts to draw. It returns a function that waits for the drawings and returns one per job."""


def report_style() -> Any:
    """Return a context manager within which figures get the style of a report."""
    import matplotlib

    return matplotlib.rc_context(_SETTINGS)


def draw_job(job: Job) -> Drawing | None:
    """Return the drawing of a job in the style of a report."""
    with report_style():
        return job()


def draw_in_process(jobs: Sequence[Job]) -> Callable[[], list[Drawing | None]]:
    """Return a function that runs the jobs one after another in this process. Nothing is drawn before it is called."""
    return lambda: [draw_job(job) for job in jobs]


def panel(height: float = 3.4) -> tuple[Any, Any]:
    """Return a figure with one pair of axes. It is 4.4 inches wide, so that its text keeps its size on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, height), layout="constrained")
    return figure, figure.subplots()


def legend_below(figure: Any, axes: Any, columns: int = 2) -> None:
    """Add a legend below the axes, where it hides nothing. If its labels are too long, it gets fewer columns."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        unique = dict(zip(labels, handles, strict=True))
        columns = min(columns, len(unique))
        while columns > 1 and _legend_width([len(label) for label in unique], columns) > LEGEND_WIDTH:
            columns -= 1
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=columns)


def _legend_width(lengths: Sequence[int], columns: int) -> int:
    """Return a legend's width in characters: the longest label of each column, plus space for its marker."""
    shares = [len(lengths) // columns + (i < len(lengths) % columns) for i in range(columns)]
    starts = [sum(shares[:i]) for i in range(columns)]
    return sum(max(lengths[start : start + n]) + 7 for start, n in zip(starts, shares, strict=True))


def plain_log(axes: Any, values: Sequence[float], *, base: int = 10) -> None:
    """Make the x axis logarithmic, labelled with plain numbers at 1, 2, 5 × 10ⁿ, or at the values if `base` is 2.

    If the values span more than a factor of 100, only 10ⁿ are labelled.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=base)
    axis = axes.xaxis
    if base == 2:
        axis.set_major_locator(FixedLocator(sorted(set(values))))
    else:
        wide = max(values) / min(values) > 100
        axis.set_major_locator(LogLocator(10, subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def log_y(axes: Any, values: Sequence[float]) -> None:
    """Make the y axis logarithmic around `values`, with about three to eight plain numbers, whatever its span."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    margin = max(0.06 * math.log(max(values) / min(values)), 0.01)
    low, high = min(values) * math.exp(-margin), max(values) * math.exp(margin)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 8:
            break
    if len(ticks) < 3:  # the span is too small for round numbers
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axes.set_ylim(low, high)  # before the scale, which would choose its own limits, and one value gives it none
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def to_drawing(figure: Any, name: str, title: str, reading: str) -> Drawing:
    """Return a finished figure as a drawing: as an SVG for the page, an SVG file and a PNG file (200 dpi)."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # the layout is done already; a second one takes a third of the time
    figure.savefig(png, format="png", dpi=200)
    return Drawing(name, title, reading, _inline(svg.getvalue(), name, title), svg.getvalue(), png.getvalue())


def _inline(svg: bytes, name: str, title: str) -> str:
    """Return an SVG for embedding in a page. It scales with its box, and shares no ID with another figure."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": title}
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.attrib[key] = f"{name}-{value}"
            elif key == _LINK:
                element.attrib[key] = value.replace("#", f"#{name}-", 1)
            elif "url(#" in value:
                element.attrib[key] = value.replace("url(#", f"url(#{name}-")
    return ElementTree.tostring(root, encoding="unicode")
