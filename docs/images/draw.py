"""Draws the pictures of the documentation into this folder: python docs/images/draw.py

The drawings are SVG without a background: boxes have fills of their own with dark text, all else is
a grey that reads on white and on black. rules.png is drawn by `Connectivity.plot`.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
GREY, DARK = "#7d8590", "#1b1f24"
ORANGE, BLUE, GREEN, PALE = "#f5bd85", "#9cc8f0", "#a9d9a4", "#d5dae1"


class Drawing:
    """Shapes in order; coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, fill: str = GREY, **style: Any) -> None:
        anchor, size = style.get("anchor", "middle"), style.get("size", 14)
        mono = ' font-family="monospace"' if "`" in words else ""
        words = escape(words.replace("`", ""))
        self.shapes.append(
            f'<text x="{x:g}" y="{y + size * 0.35:g}" font-size="{size}" fill="{fill}" '
            f'text-anchor="{anchor}"{mono}>{words}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = PALE, *lines: str
    ) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
            f'fill="{fill}" stroke="{GREY}"/>'
        )
        for i, line in enumerate(lines):
            middle = y + height / 2 + 18 * (i - (len(lines) - 1) / 2)
            self.text(x + width / 2, middle, line, DARK, size=14 if i == 0 else 12)

    def circle(self, x: float, y: float, fill: str, words: str) -> None:
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="14" fill="{fill}" stroke="{GREY}"/>')
        self.text(x, y, words, DARK, size=13)

    def line(self, x0: float, y0: float, x1: float, y1: float, arrow: bool = False) -> None:
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.shapes.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{GREY}" '
            f'stroke-width="1.5"{end}/>'
        )

    def __str__(self) -> str:
        width, height = self.size
        arrow = (
            '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" font-family="sans-serif">',
                f"<defs>{arrow}</defs>",
                *self.shapes,
                "</svg>\n",
            ]
        )


ROWS = [[0, 2], [1, 2, 4], [3], [0, 5], [3, 4]]  # the example of csr(): inputs of each dendrite
SOMA_PTR = [0, 2, 5]


def csr() -> Drawing:
    """A small network, and its arrays."""
    d = Drawing(540, 480)
    of_soma = [ORANGE, BLUE]
    soma = [s for s in range(2) for _ in range(SOMA_PTR[s], SOMA_PTR[s + 1])]
    for x, words in ((60, "inputs"), (260, "dendrites"), (460, "somas")):
        d.text(x, 14, words)
    for r, inputs in enumerate(ROWS):
        for n in inputs:
            d.line(74, 48 + 40 * n, 246, 68 + 40 * r)
        d.line(274, 68 + 40 * r, 446, 98 + 100 * soma[r])
    for n in range(6):
        d.circle(60, 48 + 40 * n, PALE, str(n))
    for r in range(5):
        d.circle(260, 68 + 40 * r, of_soma[soma[r]], str(r))
    for s in range(2):
        d.circle(460, 98 + 100 * s, of_soma[s], str(s))

    left, cell, top = 130, 40, 300
    for i, words in enumerate(["soma", "dendrite", "`col_indices", "`synapse_weight"]):
        d.text(left - 8, top + 15 + 34 * i, words, anchor="end", size=13)
    at = 0
    for r, inputs in enumerate(ROWS):
        fill = of_soma[soma[r]]
        if r in SOMA_PTR:
            size = sum(len(row) for row, s in zip(ROWS, soma, strict=True) if s == soma[r])
            d.box(left + cell * at, top, cell * size, 30, fill, str(soma[r]))
        d.box(left + cell * at, top + 34, cell * len(inputs), 30, fill, str(r))
        for n in inputs:
            d.box(left + cell * at, top + 68, cell, 30, fill, str(n))
            d.box(left + cell * at, top + 102, cell, 30, fill, f"w{at}")
            at += 1
    ends = [sum(map(len, ROWS[:r])) for r in range(len(ROWS) + 1)]
    d.text(left, top + 150, f"`crow_indices = {ends}", anchor="start", size=13)
    d.text(left, top + 172, f"`soma_ptr     = {SOMA_PTR}", anchor="start", size=13)
    return d


def way() -> Drawing:
    """From a module to a kernel."""
    d = Drawing(540, 500)
    d.box(20, 10, 330, 50, PALE, "nn", "parameters and options")
    d.box(20, 90, 330, 50, PALE, "functional", "checks shapes, dtypes, devices; chooses the path")
    d.box(20, 180, 330, 50, GREEN, "autograd", "the derivative, written once")
    d.box(380, 180, 150, 50, PALE, "transforms", "other activations")
    d.box(20, 270, 150, 60, GREEN, "fast_path", "plain CPU tensors", "that nothing observes")
    d.box(200, 270, 150, 60, GREEN, "operators", "all else: schema,", "fake kernel, dispatch")
    names = (("cpp", "csrc/cpu"), ("numba", "LLVM"), ("cuda", "csrc/cuda"), ("reference", "torch"))
    for i, (name, below) in enumerate(names):
        x = 20 + 129 * i
        d.box(x, 370, 112, 40, BLUE, name)
        d.box(x, 440, 112, 40, ORANGE, below)
        d.line(x + 56, 410, x + 56, 438, arrow=True)
        d.line(275, 330, x + 56, 368, arrow=True)
    for y in (60, 140):
        d.line(185, y, 185, y + (28 if y == 60 else 38), arrow=True)
    d.line(350, 125, 440, 178, arrow=True)
    d.line(440, 230, 352, 285, arrow=True)
    d.line(120, 230, 95, 268, arrow=True)
    d.line(250, 230, 275, 268, arrow=True)
    d.line(95, 330, 70, 368, arrow=True)
    d.box(380, 10, 150, 50, PALE, "connectivity", "given to all of them")
    return d


def slopes() -> Drawing:
    """The leaky ReLU, whose two branches one bit tells apart."""
    d = Drawing(540, 200)
    d.line(60, 130, 300, 130, arrow=True)
    d.line(180, 185, 180, 15, arrow=True)
    d.text(312, 130, "u")
    d.text(180, 8, "a", size=13)
    for x0, y0, x1, y1, colour in ((180, 130, 280, 30, ORANGE), (60, 160, 180, 130, BLUE)):
        d.shapes.append(
            f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{colour}" stroke-width="4"/>'
        )
    d.box(330, 25, 200, 50, ORANGE, "bit 1: u > 0", "m = 1, a = u")
    d.box(330, 110, 200, 50, BLUE, "bit 0: u <= 0", "m = slope, a = slope u")
    return d


def tiles() -> Drawing:
    """How the CPU kernels compute one dendrite for a tile of samples."""
    d = Drawing(540, 380)
    d.text(88, 14, "x: rows are samples")
    for b in range(8):
        for n in range(6):
            fill = ORANGE if n in (1, 2, 4) else PALE
            d.box(25 + 20 * n, 30 + 20 * b, 20, 20, fill)
    d.text(85, 206, "[B, N]", size=13)
    d.line(152, 104, 214, 104, arrow=True)
    d.text(183, 90, "transpose", size=12)
    d.text(385, 30, "tile: rows are inputs")
    for n in range(6):
        fill = ORANGE if n in (1, 2, 4) else PALE
        d.text(232, 40 + 22 * n + 20, str(n), size=12)
        for b in range(12):
            d.box(245 + 23 * b, 50 + 22 * n, 23, 20, fill)
    d.text(385, 192, "32 samples", size=13)
    d.text(20, 240, "dendrite on inputs 1, 2, 4:", anchor="start", size=13)
    terms = ("bias", "w0 * row 1", "w1 * row 2", "w2 * row 4")
    for i, words in enumerate(terms):
        d.box(25 + 125 * i, 256, 105, 34, PALE if i == 0 else ORANGE, words)
        d.text(25 + 125 * i + 115, 273, "+" if i < 3 else "", size=16)
    d.line(270, 290, 270, 318, arrow=True)
    d.box(25, 322, 230, 50, BLUE, "u of 32 samples", "times cable, added to the soma's v")
    d.box(290, 322, 225, 50, GREEN, "u > 0: one word of 32 bits", "all that backward keeps of it")
    return d


def cuda() -> Drawing:
    """How the CUDA forward kernel divides the work."""
    d = Drawing(540, 330)
    d.box(15, 10, 510, 250, "none")
    d.text(270, 28, "a block, here of four warps: one tile of samples", size=13)
    below = "every input, and a row of zeros for pads"
    d.box(40, 48, 460, 56, ORANGE, "tile of x in shared memory", below)
    for i in range(4):
        x = 40 + 118 * i
        d.line(x + 53, 104, x + 53, 132, arrow=True)
        d.box(x, 135, 106, 50, BLUE, f"warp {i}", f"soma {i}, {i + 4}, ...")
        d.line(x + 53, 185, x + 53, 208, arrow=True)
        d.box(x, 211, 106, 36, GREEN, "y, sign bits")
    d.text(270, 284, "lanes of a warp: samples, or samples of several dendrites", size=13)
    d.text(270, 308, "other tiles and other somas: other blocks", size=13)
    return d


FIELDS = [  # pixels [row, column] of each dendrite of network(), three dendrites to a soma
    [(0, 0), (0, 1), (1, 0)], [(0, 2), (1, 2), (1, 1)], [(2, 0), (2, 1), (3, 0)],
    [(2, 4), (3, 4), (3, 5)], [(4, 3), (5, 3), (4, 4)], [(4, 5), (5, 5), (5, 4)],
]  # fmt: skip


def network() -> Drawing:
    """Two neurons on an image, beside the dense matrix that would hold their synapses."""
    d = Drawing(800, 250)
    colours, cell, side = (ORANGE, BLUE), 26, 6
    owner = {pixel: r for r, field in enumerate(FIELDS) for pixel in field}
    d.text(98, 16, "image")
    d.text(290, 16, "dendrites")
    d.text(390, 16, "somas")
    d.text(620, 16, "the same as a dense matrix")
    for y in range(side):
        for x in range(side):
            r = owner.get((y, x))
            d.box(20 + cell * x, 45 + cell * y, cell, cell, PALE if r is None else colours[r // 3])
    for r, field in enumerate(FIELDS):
        middle = 48 + 30 * r
        for y, x in field:
            d.line(20 + cell * (x + 0.5), 45 + cell * (y + 0.5), 276, middle)
        d.line(304, middle, 376, 78 + 90 * (r // 3))
        d.circle(290, middle, colours[r // 3], str(r))
    for s in range(2):
        d.circle(390, 78 + 90 * s, colours[s], str(s))
    width = 9
    for r, field in enumerate(FIELDS):
        inputs = {side * y + x for y, x in field}
        d.text(450, 48 + 30 * r, str(r), size=12)
        for n in range(side**2):
            fill = colours[r // 3] if n in inputs else "none"
            d.box(460 + width * n, 39 + 30 * r, width, 18, fill)
    used = sum(map(len, FIELDS))
    d.text(98, 230, "receptive fields", size=13)
    d.text(340, 230, f"{used} synapses, 6 cables", size=13)
    d.text(620, 230, f"{len(FIELDS) * side**2} weights, {used} of them used", size=13)
    return d


DRAWINGS = {
    "network": network,
    "csr": csr,
    "way": way,
    "slopes": slopes,
    "tiles": tiles,
    "cuda": cuda,
}


def rules() -> None:
    """The receptive fields of one soma under each rule: rules.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import dendrite_kernels as dk

    shape, sizes = (28, 28), (4, 8, 16)

    def on_image(c: dk.Connectivity) -> dk.Connectivity:
        return dk.Connectivity(c.crow_indices, c.col_indices, c.soma_ptr, 784, in_shape=shape)

    drawn = {
        "random": on_image(dk.connectivity.random(784, *sizes, constant_fan_in=True, seed=1)),
        "local_receptive_fields": dk.connectivity.local_receptive_fields(shape, *sizes, seed=1),
        "global_receptive_fields": dk.connectivity.global_receptive_fields(shape, *sizes, seed=1),
        "one_to_one": on_image(dk.connectivity.one_to_one(784, 28, 28)),
        "semirandom centres": dk.connectivity.local_receptive_fields(
            shape, *sizes, centres=dk.centres.semirandom(), seed=1
        ),
        "serial centres": dk.connectivity.local_receptive_fields(
            shape, *sizes, centres=dk.centres.serial(8), seed=1
        ),
    }
    figure, axes = plt.subplots(2, 3, figsize=(6.6, 4.6), layout="constrained")
    for (name, connectivity), ax in zip(drawn.items(), axes.flat, strict=True):
        connectivity.plot([0], ax=ax)
        ax.set_title(name, fontsize=10)
    figure.savefig(FOLDER / "rules.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(str(draw()))
    if "--drawings" not in sys.argv:
        rules()
