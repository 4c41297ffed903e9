"""The receptive fields that Connectivity.plot draws; test_plot_matrix.py has the matrix."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.parametrize import register_parametrization

import dendrite_kernels as dk
from dendrite_kernels.structure import Connectivity

BLUE, RED, WHITE = ((5, 113, 176), (202, 0, 32), (247, 247, 247))  # of the smallest, largest, 0


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


# Weights


def bytes_of(colour: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(255 * c) for c in colour[:3])


def bar_of(figure: Any) -> Any:
    """The axes of the colour bar, the last ones that a picture gets."""
    return figure.axes[-1]


def test_weights_colour_every_synapse_where_it_is() -> None:
    pytest.importorskip("matplotlib")
    # Dendrite 0 has inputs 0, 1 (pixel 0) and 10, 11 (pixel 5), dendrite 1 has 10, 11, 12 (pixel 6)
    weights = torch.tensor([3.0, 0, -3, 3, 0, -3, 3, 0, 0, -3])
    figure = receptive_fields().plot(weights=weights)
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for x, y, _, colour in sorted(marks(figure.axes[0]), key=lambda m: (round(m[1]), m[1], m[0])):
        found.setdefault((round(x), round(y)), []).append(bytes_of(colour))
    assert found == {
        (0, 0): [RED, WHITE],
        (1, 1): [BLUE, RED, WHITE, BLUE],  # dendrite 0 above, its channels from left to right
        (2, 1): [RED],
    }
    # Dendrite 2 has two inputs of pixel 11, dendrite 3 has one of pixel 1.
    second = [(round(x), round(y), bytes_of(colour)) for x, y, _, colour in marks(figure.axes[1])]
    assert sorted(second) == [(1, 0, BLUE), (3, 2, WHITE), (3, 2, WHITE)]


def test_colours_between_the_limits_pale_evenly() -> None:
    pytest.importorskip("matplotlib")
    c = Connectivity.from_csr([0, 5], range(5), 5, in_shape=(1, 5))
    figure = c.plot(weights=[-4.0, -1.0, 0.0, 1.0, 2.0])
    colours = [np.array(bytes_of(m[3])) for m in sorted(marks(figure.axes[0]))]
    assert tuple(colours[0]) == BLUE
    redness = [int(c[0]) - int(c[2]) for c in colours]
    assert redness == sorted(redness)
    assert abs(redness[1] + redness[3]) < 20  # equally far from white on both sides


def test_limits_are_those_of_all_weights() -> None:
    pytest.importorskip("matplotlib")
    c, weights = receptive_fields(), torch.zeros(10)
    weights[8], weights[0] = -2.5, 1.25  # the largest is a synapse of soma 1
    for somas in ([0], [1], [0, 1]):
        bar = bar_of(c.plot(somas, weights=weights))
        assert bar.get_yticks().tolist() == [-2.5, 0, 2.5]
        assert [t.get_text() for t in bar.get_yticklabels()] == ["\u22122.5", "0", "2.5"]
        assert bar.get_ylim() == (-2.5, 2.5)
        assert bar.get_ylabel() == "synapse weight"
    none = Connectivity.from_csr([0, 0], [], 4, in_shape=(2, 2))
    for figure in (c.plot(weights=weights * 0), none.plot(weights=torch.zeros(0))):
        assert bar_of(figure).get_ylim() == (-1, 1)
        figure.savefig(io.BytesIO())


def layers() -> dict[str, Any]:
    """What weights= takes, all with the same values, which bfloat16 holds."""
    values = torch.arange(-4.0, 6)
    layer, linear = dk.DendriticLayer(receptive_fields()), dk.SparseLinear(receptive_fields())
    signed, low = dk.DendriticLayer(receptive_fields()), values.bfloat16()
    with torch.no_grad():
        for parameter in (layer.synapse_weight, linear.weight, signed.synapse_weight):
            parameter.copy_(values)
    register_parametrization(signed, "synapse_weight", dk.Signed(torch.where(values < 0, -1, 1)))
    return {
        "DendriticLayer": layer,
        "SparseLinear": linear,
        "parametrized": signed,
        "parameter": layer.synapse_weight,
        "bfloat16": low,
        "integers": values.to(torch.int8),
        "numpy": values.numpy(),
        "list": values.tolist(),
    }


@pytest.mark.parametrize("kind", list(layers()))
def test_weights_come_from_layers_and_tensors(kind: str) -> None:
    pytest.importorskip("matplotlib")
    expected = receptive_fields().plot(weights=torch.arange(-4.0, 6))
    found = receptive_fields().plot(weights=layers()[kind])
    for a, b in zip(found.axes[:2], expected.axes[:2], strict=True):
        assert marks(a) == marks(b)
    assert bar_of(found).get_ylim() == (-5, 5)


WRONG_WEIGHTS: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(9), ValueError, r"weights of shape \[10\], got \[9\]"),
    (torch.zeros(1, 10), ValueError, r"weights of shape \[10\], got \[1, 10\]"),
    (torch.zeros(10, dtype=torch.bool), TypeError, "weights of a real dtype, got bool"),
    (torch.zeros(10, dtype=torch.complex64), TypeError, "weights of a real dtype, got complex64"),
    (["a"] * 10, TypeError, "weights of a real dtype, got <U1"),
    (torch.tensor([0.0] * 3 + [torch.nan] * 7), ValueError, "finite .*, got nan at synapse 3"),
    (torch.full((10,), 1e308, dtype=torch.float64), ValueError, r"up to 4.49e\+307, got 1e\+308"),
    (torch.zeros(10, device="meta"), TypeError, "values, got a torch.strided tensor on meta"),
    (torch.nn.Linear(2, 5), TypeError, "DendriticLayer, SparseLinear or tensor, got Linear"),
    (dk.SparseLinear(Connectivity.from_csr([0, 10], range(10), 10)), ValueError,
     "Expected a layer on Connectivity.*num_dendrites=4,.*, got one on .*num_dendrites=1,"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "error", "message"), WRONG_WEIGHTS)
def test_errors_of_weights(weights: Any, error: type[Exception], message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(error, match=message):
        receptive_fields().plot(weights=weights)


# Axes of the caller


def test_plot_into_axes() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    c, weights = receptive_fields(), torch.arange(10.0)
    figure, axes = pyplot.subplots(1, 3, layout="constrained")
    try:
        assert c.plot(ax=axes[0]) is figure  # the first soma
        assert c.plot([1], ax=axes[1], weights=weights, image=np.zeros((3, 4))) is figure
        assert [len(marks(panel)) for panel in axes[:2]] == [4, 3]
        assert marks(axes[0]) == marks(c.plot([0]).axes[0])
        assert marks(axes[1]) == marks(c.plot([1], weights=weights).axes[0])
        assert len(figure.axes) == 4  # with a colour bar
        assert not axes[2].has_data()
        figure.savefig(io.BytesIO())
    finally:
        pyplot.close(figure)


def test_errors_of_axes() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure()
    ax, c = figure.subplots(), receptive_fields()
    with pytest.raises(ValueError, match="Expected figure or ax, got both"):
        c.plot([0], figure=figure, ax=ax)
    with pytest.raises(ValueError, match="Expected one soma with ax, got 2"):
        c.plot([0, 1], ax=ax)
    assert not ax.has_data()


def test_plot_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"somas in \[0, 2\), got 2"):
        receptive_fields().plot([0, 2])
    with pytest.raises(ValueError, match="Expected at least one soma"):
        receptive_fields().plot([])
    with pytest.raises(TypeError, match="sequence of integers as somas, got 1"):
        receptive_fields().plot(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"image of 3 x 4 pixels, got \(4, 3\)"):
        receptive_fields().plot(image=np.zeros((4, 3)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dendrite-kernels\[plot\]"):
        receptive_fields().plot()
