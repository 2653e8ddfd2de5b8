"""How charts are drawn and numbers written, in the report and in whatever stands beside it.

A chart is an SVG inside its page: coloured by the page's CSS variables, in the page's font, with its numbers in words.
Leaves out what is drawn: that is report.py's and frontier.py's business.
"""

import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_core.statistics import Array

# Charts are drawn in these marker colours, which become CSS variables, so that one SVG serves light and dark.
COLOURS = {
    "ink": "#010101", "muted": "#020202", "grid": "#030303", "paper": "#040404",
    "base": "#050505", "sft": "#060606", "ppo": "#070707", "proxy": "#080808", "gold": "#090909",
    "dpo": "#0a0a0a",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "rlhf", "svg.fonttype": "none", "font.size": 11.5, "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.edgecolor": COLOURS["grid"], "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": COLOURS["grid"], "grid.linewidth": 0.8, "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"], "xtick.color": COLOURS["grid"], "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"], "ytick.labelcolor": COLOURS["muted"], "ytick.major.size": 0,
    "xtick.major.size": 3, "axes.labelsize": 11, "xtick.labelsize": 11, "ytick.labelsize": 11,
    "text.parse_math": False, "lines.solid_capstyle": "round",
}  # fmt: skip
WIDTH, HEIGHT = 340 / 72, 190 / 72  # one panel, in inches of 72 units: drawn at about its own size on a phone


@contextmanager
def house_style() -> Iterator[None]:
    """Draw inside of this; what the machine's own matplotlibrc says changes no byte, and is left as it was."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def percent(value: Any, digits: int = 0) -> str:
    """A share as a percentage, "–" where there is none."""
    return "–" if lacks(value) else f"{100 * float(value):.{digits}f}%"


def number(value: Any, digits: int = 2) -> str:
    """A number with a true minus sign, "–" where there is none."""
    if lacks(value):
        return "–"
    text = f"{float(value):,.{digits}f}"
    return text.replace("-", "−" if float(text.replace(",", "")) else "")


def signed(value: float, digits: int = 2) -> str:
    """A difference, with its sign even when it is positive."""
    text = number(value, digits)
    return text if text.startswith("−") else f"+{text}"


def plain(text: str) -> str:
    """Text a browser and a UTF-8 file can hold: control characters and lone surrogates become U+FFFD."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def lacks(value: Any) -> bool:
    """Whether a cell holds no number."""
    return value is None or value == "" or not math.isfinite(float(value))


def new_axes(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty chart of that many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name at its right end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    height = axes.get_figure().get_size_inches()[1] * 72 - 45  # type: ignore[union-attr]
    gap = 14 / height * (high - low)
    position = -math.inf
    for value, label, colour in sorted(ends):
        position = max(value, position + gap)
        axes.annotate(label, (x, position), (7, 0), textcoords="offset points", va="center", fontweight="bold",
                      color=COLOURS[colour], annotation_clip=False)  # fmt: skip


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as an inline SVG: colours from CSS variables, the page's own font, no metadata, alt text inside."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    opening, _, drawing = buffer.getvalue().partition("<svg")[2].partition(">")
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
    assert box is not None, "matplotlib always writes a viewBox"
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' id="[a-zA-Z.]+\d*_\d+"| transform="rotate\(-0 [^"]*"| ?font-family: [^;"]*;?', "", drawing)
    # hundredths of a pixel are enough for coordinates; the words of the chart, outside of tags, keep every digit
    drawing = re.sub(r"<[^>]+>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", tag[0]), drawing)
    prefix = f"{zlib.crc32(alt.encode()):08x}"  # two charts of one page share no id
    drawing = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=xlink:href="#)', prefix, drawing).replace("xlink:href", "href")
    for name, colour in COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    drawing = re.sub(r"\s*\n\s*", "\n", drawing)
    width = f"{float(box[1]):.0f}"
    return Markup(
        f'<svg viewBox="{box[0][9:]} role="img" style="max-width:{width}px"><title>{escape(alt)}</title>{drawing}'
    )


def running_mean(values: Array) -> Array:
    """Mean over each value and its two neighbours on either side, as far as there are any."""
    return np.array([values[max(0, i - 2) : i + 3].mean() for i in range(len(values))])


def root(kl: float) -> float:
    """√KL, over which scores are drawn."""
    return math.sqrt(max(kl, 0.0))  # the estimate of a KL near 0 can be negative


def short(value: float) -> str:
    """Three significant digits, for axes and labels."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")
