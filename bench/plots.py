"""How the figures of all reports look, and their files."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# Of Okabe and Ito, which colour-blind readers can tell apart.
GREEN, RED, BLUE, PURPLE, ORANGE, SKY = (
    "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
GREY, MISSING = "#4D4D4D", "#777777"

styled = matplotlib.rc_context(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.wspace": 0.08,
        "figure.constrained_layout.hspace": 0.06,
        "figure.constrained_layout.w_pad": 0.08,
        "figure.constrained_layout.h_pad": 0.08,
    }
)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """As PNG and as SVG; the same figure gives the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=160)
    figure.set_layout_engine("none")  # what is laid out already need not be again
    paths[1].write_bytes(svg(figure, name))
    return paths


def svg(figure: Figure, name: str) -> bytes:
    """The same figure and name give the same bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None}, dpi=160)
    return file.getvalue()
