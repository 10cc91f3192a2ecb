"""Figures for pages, as SVG text in one style."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import count
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from spartan.errors import printable

_COLORS = ["#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#4d4d4d"]
# Left out of the pictures: they name outside addresses and change from day to day.
_SVG_METADATA = ("Creator", "Date", "Format", "Type")
_FIGURE_NUMBERS = count()


def color_of(number: int) -> str:
    """Return the colour of the run of this number."""
    return _COLORS[number % len(_COLORS)]


def label_of(name: str) -> str:
    """Return a name as a label: matplotlib leaves those out that begin with an underscore."""
    name = printable(name)
    return f"\u200b{name}" if name.startswith("_") else name


def figure(
    draw: Callable[[Axes], None],
    x_label: str,
    y_label: str,
    legend: bool = False,
    log: bool = False,
    size: tuple[float, float] = (7.6, 3.0),
) -> str:
    """Return what `draw` puts on axes, as SVG text."""
    # Names are data: a dollar in one begins no formula.
    settings: Any = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_axisbelow(True)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        low, high = axes.dataLim.intervaly
        # Within a factor of two a log scale is nearly linear, and its ticks would all read alike.
        if log and not high <= 2 * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter())
        if legend:
            axes.legend(frameon=False, fontsize=8)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(_SVG_METADATA))
    return _inline(text.getvalue())


def _inline(svg: str) -> str:
    """Cut the XML prologue and make ids unique among the figures of one page."""
    svg = svg[svg.index("<svg") :]
    prefix = f"f{next(_FIGURE_NUMBERS)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    return re.sub(r"url\(#", f"url(#{prefix}", svg)
