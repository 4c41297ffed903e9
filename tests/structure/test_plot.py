"""The picture of receptive fields that Connectivity.plot draws."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dendrite_kernels.structure import Connectivity


def receptive_fields() -> Connectivity:
    """2 somas of 2 dendrites on a 3 x 4 image with 2 channels; soma 0 shares pixel 5."""
    col = [0, 1, 10, 11, 10, 11, 12, 22, 23, 3]
    return Connectivity.from_csr([0, 4, 7, 9, 10], col, 24, [0, 2, 4], in_shape=(3, 4, 2))


def marks(panel: Any) -> list[tuple[float, float, float, tuple[float, ...]]]:
    """Centre x, y, area and colour of every mark in a panel."""
    collection = panel.collections[-1]
    found = []
    for path, colour in zip(collection.get_paths(), collection.get_facecolors(), strict=True):
        (x0, y0), (x1, y1) = path.vertices[:4].min(0), path.vertices[:4].max(0)
        found.append(((x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * (y1 - y0), tuple(colour)))
    return found


def test_plot_marks_every_pixel_of_every_dendrite() -> None:
    pytest.importorskip("matplotlib")
    figure = receptive_fields().plot()
    first, second = figure.axes
    assert first.get_title() == "soma 0: 2 dendrites"
    # Dendrite 0 sees pixels 0 and 5, dendrite 1 sees 5 and 6 (one channel is enough).
    found = [(round(x), round(y)) for x, y, _, _ in marks(first)]
    assert sorted(found) == [(0, 0), (1, 1), (1, 1), (2, 1)]
    colours = {(round(x), round(y)): c for x, y, _, c in marks(first)}
    shared = [m for m in marks(first) if (round(m[0]), round(m[1])) == (1, 1)]
    assert {m[3] for m in shared} == {colours[0, 0], colours[2, 1]}
    assert colours[0, 0] != colours[2, 1]
    assert shared[0][2] == pytest.approx(marks(first)[0][2] / 2)
    assert [(round(x), round(y)) for x, y, _, _ in marks(second)] == [(1, 0), (3, 2)]


def test_plot_marks_the_same_pixels_with_channels_first() -> None:
    pytest.importorskip("matplotlib")
    last = receptive_fields()
    mask = last.to_mask().unflatten(1, (3, 4, 2)).movedim(3, 1).flatten(1)
    first = Connectivity.from_mask(mask, [0, 2, 4], in_shape=(2, 3, 4), channels_first=True)
    for a, b in zip(last.plot().axes, first.plot().axes, strict=True):
        assert marks(a) == marks(b)


@pytest.mark.parametrize("dendrites", [1, 8, 9, 64])
def test_plot_gives_every_dendrite_its_colour(dendrites: int) -> None:
    pytest.importorskip("matplotlib")
    c = Connectivity.from_mask(np.ones((dendrites, 6), bool), [0, dendrites], in_shape=(2, 3))
    found = marks(c.plot().axes[0])
    assert len(found) == 6 * dendrites
    assert len({m[3] for m in found}) == dendrites
    assert sum(m[2] for m in found) == pytest.approx(6 * 0.88**2)  # shared pixels are filled


def test_plot_options(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from matplotlib.figure import Figure

    before = pyplot.get_fignums()
    c = Connectivity.from_csr([0] * 13, [], 4, dendrites_per_soma=1, in_shape=(2, 2))
    assert len([p for p in c.plot().axes if p.get_title()]) == 8
    assert [p.get_title() for p in c.plot([11, 0]).axes] == [
        "soma 11: 1 dendrite",
        "soma 0: 1 dendrite",
    ]
    own = Figure()
    assert receptive_fields().plot([1], image=np.zeros((3, 4, 3)), figure=own) is own
    own.savefig(tmp_path / "a.png")
    own.savefig(tmp_path / "a.pdf")
    assert pyplot.get_fignums() == before  # nothing left open behind the caller's back


def test_plot_of_a_soma_without_dendrites() -> None:
    pytest.importorskip("matplotlib")
    c = Connectivity.from_csr([0, 1], [0], 4, soma_ptr=[0, 0, 1], in_shape=(2, 2))
    assert marks(c.plot().axes[0]) == []


def test_plot_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="Expected a connectivity with in_shape"):
        Connectivity.from_csr([0, 1], [0], 4).plot()
    with pytest.raises(ValueError, match=r"somas in \[0, 2\), got 2"):
        receptive_fields().plot([0, 2])
    with pytest.raises(ValueError, match="Expected at least one soma"):
        receptive_fields().plot([])
    with pytest.raises(ValueError, match=r"image of 3 x 4 pixels, got \(4, 3\)"):
        receptive_fields().plot(image=np.zeros((4, 3)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install dendrite-kernels\[plot\]"):
        receptive_fields().plot()
