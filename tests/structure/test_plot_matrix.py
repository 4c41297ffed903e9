"""The matrix that Connectivity.plot draws where the inputs are no image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels.structure import Connectivity

pytest.importorskip("matplotlib")

Array = np.ndarray[Any, np.dtype[Any]]
BLUE, RED, WHITE = ((5, 113, 176), (202, 0, 32), (247, 247, 247))  # of the smallest, largest, 0


def labelled() -> tuple[Connectivity, torch.Tensor]:
    """4 inputs; soma A of dendrites p and q, soma B of r."""
    made: tuple[Connectivity, torch.Tensor] = Connectivity.from_edges(
        ["axon 3", "axon 1", "axon 3", "axon 2"],
        ["p", "r", "q", "p"],
        ["A", "B", "A", "A"],
        [0.0, -2.0, 1.0, 2.0],
        inputs=["axon 0", "axon 1", "axon 2", "axon 3"],
    )
    return made


def rendered(figure: Any, rows: int, columns: int) -> Array:
    """[rows, columns, 3]: the colour of the picture in the middle of every place of the matrix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    at = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    x, y = figure.axes[0].transData.transform(at).T.astype(int)
    return pixels[pixels.shape[0] - 1 - y, x, :3].reshape(rows, columns, 3)


def names(axis: Any) -> dict[float, str]:
    texts = [label.get_text() for label in axis.get_ticklabels()]
    return dict(zip(axis.get_ticklocs().tolist(), texts, strict=True))


def soma_axis(panel: Any) -> Any:
    return panel.child_axes[0].yaxis


def test_every_synapse_is_in_its_row_and_column() -> None:
    c = dk.connectivity.random(13, 4, 3, 5, seed=0)
    found = rendered(c.plot(), 12, 13)
    marked = (found != found[~c.to_mask().numpy()][0]).any(-1)
    assert np.array_equal(marked, c.to_mask().numpy())
    assert len(np.unique(found.reshape(-1, 3), axis=0)) == 2


def test_weights_are_colours_in_their_places() -> None:
    c, weights = labelled()
    found = rendered(c.plot(weights=weights), 3, 4)
    ground = found[0, 0]
    assert tuple(found[0, 3]) == WHITE  # p <- axon 3, weight 0, is not ...
    assert tuple(ground) not in (WHITE, BLUE, RED)  # ... as no synapse
    assert tuple(found[0, 2]) == RED  # p <- axon 2
    assert tuple(found[2, 1]) == BLUE  # r <- axon 1
    assert found[1, 3, 0] > found[1, 3, 2] + 50  # q <- axon 3, positive, paler than red
    assert found[1, 3, 1] > RED[1] + 50
    absent = ~c.to_mask().numpy()
    assert (found[absent] == ground).all()
    figure = c.plot(weights=weights)
    assert figure.axes[-1].get_xlim() == (-2, 2)
    assert figure.axes[-1].get_xlabel() == "synapse weight"


def test_labels_name_rows_columns_and_somas() -> None:
    panel = labelled()[0].plot().axes[0]
    assert names(panel.xaxis) == {0: "axon 0", 1: "axon 1", 2: "axon 2", 3: "axon 3"}
    assert names(panel.yaxis) == {0: "p", 1: "q", 2: "r"}
    assert names(soma_axis(panel)) == {0.5: "A", 2: "B"}
    lines = panel.collections[-1].get_segments()  # between the somas
    assert [line[:, 1].tolist() for line in lines] == [[1.5, 1.5]]


def test_somas_choose_rows() -> None:
    c, weights = labelled()
    figure = c.plot([1, 0], weights=weights)
    panel = figure.axes[0]
    assert names(panel.yaxis) == {0: "r", 1: "p", 2: "q"}
    assert names(soma_axis(panel)) == {0: "B", 1.5: "A"}
    assert tuple(rendered(figure, 3, 4)[0, 1]) == BLUE
    one = c.plot([0], weights=weights)
    assert names(one.axes[0].yaxis) == {0: "p", 1: "q"}
    assert one.axes[-1].get_xlim() == (-2, 2)  # of all weights: r has the one of size 2 below 0


def test_numbers_where_nothing_has_a_label() -> None:
    c = Connectivity.from_csr([0, 1, 2, 3], [0, 1, 0], 2, [0, 2, 3])
    panel = c.plot([1, 0]).axes[0]
    assert names(panel.yaxis) == {0: "2", 1: "0", 2: "1"}
    assert names(soma_axis(panel)) == {0: "1", 1.5: "0"}
    own = Connectivity.from_csr([0, 1, 2], [0, 1], 2).plot().axes[0]
    assert own.child_axes == []  # every dendrite is its own soma: named once


def test_strange_labels() -> None:
    c = Connectivity.from_edges(["$\\bad$", ("a", 1)], [None or 0, "x" * 99], ["s", "s"])
    figure = c.plot()
    figure.savefig(io.BytesIO())
    assert names(figure.axes[0].xaxis) == {0: "$\\bad$", 1: "('a', 1)"}
    assert names(figure.axes[0].yaxis) == {0: "0", 1: "x" * 23 + "\u2026"}


def brute_force(mask: Array, weight: Array | None, step: tuple[int, int]) -> Array:
    rows, columns = (range(0, n, s) for n, s in zip(mask.shape, step, strict=True))
    picture = np.full((len(rows), len(columns)), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            cell = (slice(row, row + step[0]), slice(column, column + step[1]))
            if not mask[cell].any():
                continue
            if weight is None:
                picture[i, j] = mask[cell].mean()
            else:
                values = weight[cell][mask[cell]]
                picture[i, j] = values[np.abs(values).argmax()]
    return picture


@pytest.mark.parametrize("weighted", [False, True])
def test_cells_of_a_large_matrix(weighted: bool) -> None:
    c = dk.connectivity.random(1234, 97, 8, 12, seed=0)
    weight = torch.randn(c.nnz, dtype=torch.float64)
    dense = np.zeros((776, 1234))
    dense[c.to_mask().numpy()] = weight.numpy()
    figure = c.plot(weights=weight) if weighted else c.plot()
    image = figure.axes[0].images[0]
    picture = image.get_array().filled(np.nan)
    step = -(-776 // picture.shape[0]), -(-1234 // picture.shape[1])
    assert step[0] > 1
    assert step[1] > 1
    expected = brute_force(c.to_mask().numpy(), dense if weighted else None, step)
    np.testing.assert_array_equal(picture, expected)
    left, right, bottom, top = image.get_extent()
    assert (left, top) == (-0.5, -0.5)
    assert (right + 0.5, bottom + 0.5) == (picture.shape[1] * step[1], picture.shape[0] * step[0])
    assert figure.axes[0].get_xlim() == (-0.5, 1233.5)
    assert figure.axes[0].get_ylim() == (775.5, -0.5)
    assert figure.axes[-1].get_xlabel() == ("largest weight in a cell" if weighted else "density")


def test_a_small_last_cell_does_not_set_the_scale() -> None:
    mask = np.zeros((1001, 3), bool)
    mask[:999:4, 0] = mask[1000] = True  # the last cell has fewer rows, and more in them
    figure = Connectivity.from_mask(mask).plot()
    picture = figure.axes[0].images[0].get_array().filled(0)
    assert figure.axes[-1].get_xlim() == (0, picture[:-1].max())
    assert picture[-1].max() > picture[:-1].max()


def test_ticks_of_large_matrices_are_few_and_round() -> None:
    c = dk.connectivity.random(784, 512, 16, 4, seed=0)
    panel = c.plot().axes[0]
    assert panel.get_xlabel() == "784 inputs"
    assert panel.get_ylabel() == "8,192 dendrites"
    assert names(panel.yaxis) == {2000 * i: str(2000 * i) for i in range(5)}
    assert names(panel.xaxis) == {100 * i: str(100 * i) for i in range(8)}
    assert names(soma_axis(panel)) == {1600 * i + 7.5: str(100 * i) for i in range(6)}


def test_millions_of_synapses_make_a_small_file() -> None:
    c = dk.connectivity.random(5000, 1000, 16, 160, constant_fan_in=True, seed=0)
    assert c.nnz > 2_500_000
    weight = torch.randn(c.nnz)
    for form in ("png", "pdf"):
        file = io.BytesIO()
        c.plot(weights=weight).savefig(file, format=form)
        assert len(file.getvalue()) < 2_000_000


def test_plot_into_axes() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    c, weights = labelled()
    figure, axes = pyplot.subplots(2, 2, layout="constrained")
    try:
        assert c.plot(ax=axes[0, 0]) is figure
        assert c.plot([1], ax=axes[1, 0], weights=weights) is figure
        assert names(axes[0, 0].yaxis) == {0: "p", 1: "q", 2: "r"}
        assert names(axes[1, 0].yaxis) == {0: "r"}
        assert not axes[0, 1].has_data()
        assert len(figure.axes) == 5  # with a colour bar
        figure.savefig(io.BytesIO())
        own = pyplot.figure()
        assert c.plot(figure=own) is own
        pyplot.close(own)
    finally:
        pyplot.close(figure)


def test_networks_without_synapses() -> None:
    c = Connectivity.from_csr([0, 0, 0], [], 3, soma_ptr=[0, 0, 2])
    for weights in (None, torch.zeros(0)):
        c.plot(weights=weights).savefig(io.BytesIO())
    with pytest.raises(ValueError, match="Expected somas with dendrites, got none"):
        c.plot([0])


def test_errors() -> None:
    c, _ = labelled()
    with pytest.raises(ValueError, match="with in_shape under an image, got in_shape=None"):
        c.plot(image=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"somas in \[0, 2\), got 2"):
        c.plot([2])
    with pytest.raises(TypeError, match="integer"):
        c.plot([0.5])  # type: ignore[list-item]
    figure = c.plot()
    with pytest.raises(ValueError, match="Expected figure or ax, got both"):
        c.plot(figure=figure, ax=figure.axes[0])
    with pytest.raises(ValueError, match=r"weights of shape \[4\], got \[3\]"):
        c.plot(weights=torch.zeros(3))
