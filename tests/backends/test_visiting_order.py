"""The order in which C++ kernels visit dendrites, and that results do not depend on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from dendrite_kernels.backends import _order, cpp
from dendrite_kernels.backends.protocol import Operands
from tests import oracle
from tests.marks import needs_cpp

SOMAS = 2 * _order.MOST_SOMAS + 7  # two groups and a piece of one


def uneven(seed: int = 0) -> Connectivity:
    """Somas of 0 to 5 dendrites of 0 to 20 synapses."""
    rng = np.random.default_rng(seed)
    soma_ptr = np.concatenate(([0], np.cumsum(rng.integers(0, 6, SOMAS))))
    mask = rng.random((soma_ptr[-1], 60)) < rng.random((soma_ptr[-1], 1)) * 0.3
    return Connectivity.from_mask(torch.from_numpy(mask), soma_ptr=soma_ptr)


def pruned_fields() -> Connectivity:
    """Local receptive fields that lost synapses here and there."""
    full = dk.connectivity.local_receptive_fields((16, 16), SOMAS, 4, 25, seed=0)
    mask = full.to_mask() & (torch.rand(full.num_dendrites, full.in_features) < 0.9)
    return Connectivity.from_mask(mask, dendrites_per_soma=4)


def uneven_fields() -> Connectivity:
    """Somas of any number of dendrites, or none; every seventh dendrite lost its synapses."""
    full = dk.connectivity.local_receptive_fields((16, 16), SOMAS, 5, 25, seed=0)
    mask = full.to_mask()
    mask[::7] = False
    ends = np.sort(np.random.default_rng(0).integers(0, full.num_dendrites + 1, SOMAS - 1))
    soma_ptr = np.concatenate(([0], ends, [full.num_dendrites]))
    return Connectivity.from_mask(mask, soma_ptr=soma_ptr)


ORDERED: dict[str, Callable[[], Connectivity]] = {
    "local": lambda: dk.connectivity.local_receptive_fields((16, 12), SOMAS, 5, 16, seed=0),
    "colour": lambda: dk.connectivity.local_receptive_fields(
        (12, 12), SOMAS, 3, 16, channels=3, seed=0
    ),
    "many dendrites": lambda: dk.connectivity.local_receptive_fields((9, 9), 40, 64, 16, seed=0),
    "few somas": lambda: dk.connectivity.local_receptive_fields((9, 9), 3, 40, 16, seed=0),
    "pruned": pruned_fields,
    "uneven fields": uneven_fields,
}
NATURAL: dict[str, Callable[[], Connectivity]] = {
    "constant": lambda: dk.connectivity.random(90, SOMAS, 6, 12, constant_fan_in=True, seed=0),
    "variable": lambda: dk.connectivity.random(90, SOMAS, 6, 12, seed=0),
    "uneven": uneven,
    "global": lambda: dk.connectivity.global_receptive_fields((20, 20), SOMAS, 16, 16, seed=0),
    "one dendrite": lambda: Connectivity.from_csr([0, 3], [0, 1, 2], 4),
    "no synapse": lambda: Connectivity.from_csr([0, 0, 0], [], 4),
    "sorted already": lambda: Connectivity.from_mask(
        torch.ones(40, 40).tril(3).triu(-3).bool(), dendrites_per_soma=4
    ).stack([dk.connectivity.random(40, 10, 4, 7, constant_fan_in=True, seed=0)]),
}


@pytest.mark.parametrize("name", ORDERED)
def test_an_order_moves_dendrites_within_groups_of_somas(name: str) -> None:
    c = ORDERED[name]()
    order = _order.by_centre(c)
    assert order is not None
    dendrite = order.dendrite.astype(np.int64)
    assert np.array_equal(np.sort(dendrite), np.arange(c.num_dendrites))
    soma_ptr, crow = c.soma_ptr.numpy(), c.crow_indices.numpy()
    soma = np.searchsorted(soma_ptr, np.arange(c.num_dendrites), side="right") - 1
    assert np.array_equal(order.soma, soma[dendrite])
    for first in range(0, c.num_somas, order.group_size):
        stop = min(first + order.group_size, c.num_somas)
        part = dendrite[soma_ptr[first] : soma_ptr[stop]]
        assert np.array_equal(np.sort(part), np.arange(soma_ptr[first], soma_ptr[stop]))
    for position, r in enumerate(dendrite):
        here = order.columns[order.crow[position] : order.crow[position + 1]]
        assert np.array_equal(here, c.col_indices[crow[r] : crow[r + 1]])


@pytest.mark.parametrize(("dendrites", "somas"), [(1, 64), (16, 64), (50, 20), (1500, 1)])
def test_a_group_has_about_a_thousand_dendrites(dendrites: int, somas: int) -> None:
    c = dk.connectivity.local_receptive_fields((16, 12), 80, dendrites, 16, seed=0)
    order = _order.by_centre(c)
    assert order is not None
    assert order.group_size == somas


@pytest.mark.parametrize("name", ORDERED)
def test_rows_without_somas_move_within_groups_of_their_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_order, "MIXED_ROWS", 50)
    c = ORDERED[name]()
    order = _order.rows_by_centre(c)
    assert order is not None
    assert (order.soma, order.group_size) == (None, 50)
    row = order.dendrite.astype(np.int64)
    assert np.array_equal(np.sort(row), np.arange(c.num_dendrites))
    assert np.array_equal(row // 50, np.arange(c.num_dendrites) // 50)
    for position, r in enumerate(row):
        here = order.columns[order.crow[position] : order.crow[position + 1]]
        assert np.array_equal(here, c.col_indices[c.crow_indices[r] : c.crow_indices[r + 1]])


@pytest.mark.parametrize("name", NATURAL)
def test_no_order_where_it_gains_nothing(name: str) -> None:
    assert _order.by_centre(NATURAL[name]()) is None
    assert _order.rows_by_centre(NATURAL[name]()) is None


@pytest.mark.parametrize("synapses", [4, 9, 16, 40])
@pytest.mark.parametrize(
    ("shape", "channels"), [((28, 28), 1), ((32, 32), 3), ((16, 12), 1), ((12, 16), 1), ((9, 9), 2)]
)
def test_fields_tell_how_long_a_row_of_the_image_is(
    shape: tuple[int, int], channels: int, synapses: int
) -> None:
    c = dk.connectivity.local_receptive_fields(
        shape, 50, 4, synapses, channels=channels, seed=synapses
    )
    assert _order._row_length(c) == shape[1] * channels


def test_fields_are_visited_in_bands_of_rows() -> None:
    """The centre moves by a few pixels from one to the next, but for the ends of groups."""
    side = 28
    c = dk.connectivity.local_receptive_fields((side, side), _order.MOST_SOMAS, 16, 16, seed=0)
    order = _order.by_centre(c)
    assert order is not None
    y, x = np.divmod(order.columns.reshape(-1, 16).astype(np.int64), side)
    steps = np.hypot(np.diff(y.mean(1)), np.diff(x.mean(1)))
    natural_y, natural_x = np.divmod(c.col_indices.numpy().reshape(-1, 16), side)
    natural = np.hypot(np.diff(natural_y.mean(1)), np.diff(natural_x.mean(1)))
    assert steps.mean() < 2 < 10 < natural.mean()


def test_neighbours_share_inputs() -> None:
    order = _order.by_centre(ORDERED["local"]())
    assert order is not None
    columns = order.columns.reshape(-1, 16)
    shared = [np.intersect1d(a, b).size for a, b in itertools.pairwise(columns)]
    assert np.mean(shared) > 5


@needs_cpp
@pytest.mark.parametrize("batch", [1, 16, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ORDERED)
def test_results_do_not_depend_on_the_order(
    name: str, dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each dendrite's sum is the same number; only sums of several are added in another order."""
    c = ORDERED[name]()
    same = Connectivity.from_csr(c.crow_indices, c.col_indices, c.in_features, c.soma_ptr)
    ordered = results(c, batch, dtype)
    for order in ("by_centre", "rows_by_centre"):
        monkeypatch.setattr(_order, order, lambda c: None)
    natural = results(same, batch, dtype)
    assert torch.equal(ordered.pop("signs"), natural.pop("signs"))
    for result, value in ordered.items():
        assert oracle.relative_error(value, natural[result]) < 40 * torch.finfo(dtype).eps, result


def results(c: Connectivity, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Forward, then the backward that needs no dx from fixed y and signs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    x, weight = draw(batch, c.in_features), draw(c.nnz)
    bias, cable, soma_bias = draw(c.num_dendrites), draw(c.num_dendrites), draw(c.num_somas)
    grad, y_fixed = draw(batch, c.num_somas), draw(batch, c.num_somas)
    layer = Operands(weight, bias, cable, soma_bias, c, 0.1, 0.1)
    y, signs = cpp.forward(x, layer, True, False)
    names = "dw", "dbd", "dc", "dbs"
    gradients = cpp.backward(grad, x, y_fixed, signs, layer, False)[1:]
    bits = torch.arange(32)
    unpacked = (signs[:, None] >> bits[:, None] & 1).flatten(0, 1)[:batch]
    u, _ = cpp.forward(x, Operands(weight, bias, None, None, c, 1.0, 1.0), False, False)
    return {"y": y, "u": u, "signs": unpacked, **dict(zip(names, gradients, strict=True))}
