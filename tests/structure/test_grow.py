"""Connectivity.grow: dendrites at the end of every soma's block, against lists of lists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, structure
from dendrite_kernels._combine import new_rows
from dendrite_kernels.labels import Labels
from tests.networks import ragged, small

Somas = list[list[list[int]]]


def somas(c: Connectivity) -> Somas:
    """The inputs of each dendrite of each soma."""
    crow, col = c.crow_indices.tolist(), c.col_indices.tolist()
    rows = [col[a:b] for a, b in itertools.pairwise(crow)]
    return [rows[a:b] for a, b in itertools.pairwise(c.soma_ptr.tolist())]


def made(network: Somas, inputs: int) -> Connectivity:
    rows = [row for soma in network for row in soma]
    crow = np.cumsum([0, *map(len, rows)])
    pointer = np.cumsum([0, *map(len, network)])
    return Connectivity.from_csr(crow, [i for row in rows for i in row], inputs, pointer)


POINTERS = {
    "ragged": [0, 0, 1, 7, 7, 36, 40],
    "constant": [0, 4, 8, 12, 16, 20, 24],
    "one soma has all": [0, 0, 0, 9, 9, 9, 9],
    "one dendrite": [0, 0, 0, 0, 0, 0, 1],
}


@pytest.mark.parametrize("old", POINTERS)
@pytest.mark.parametrize("new", POINTERS)
def test_dendrites_come_last_in_their_somas(old: str, new: str) -> None:
    a, b = (
        ragged(61, POINTERS[name][-1], POINTERS[name], seed) for seed, name in enumerate((old, new))
    )
    grown, before = a.grow(b), (somas(a), somas(b))
    expected = [first + second for first, second in zip(*before, strict=True)]
    assert somas(grown) == expected
    assert grown == made(expected, 61)
    rows = new_rows(a, b)
    assert rows.dtype == np.int64
    flat = [row for soma in expected for row in soma]
    assert [flat[r] for r in rows] == [row for soma in before[1] for row in soma]
    assert (somas(a), somas(b)) == before
    assert somas(grown.grow(b)) == [x + y for x, y in zip(expected, before[1], strict=True)]


def test_constant_sizes_stay_constant() -> None:
    a = dk.connectivity.random(30, 5, 3, 4, constant_fan_in=True, seed=0)
    b = dk.connectivity.random(30, 5, 2, 4, constant_fan_in=True, seed=1)
    grown = a.grow(b)
    assert (grown.fan_in, grown.dendrites_per_soma, grown.nnz) == (4, 5, 100)
    assert grown.grow(dk.connectivity.random(30, 5, 1, 2, seed=0)).fan_in is None
    full = dk.connectivity.all_to_all(6, 2, 1)
    assert full.grow(full).is_dense


def test_labels_and_images() -> None:
    a = Connectivity.from_edges(
        ["x", "y", "x"], ["d0", "d1", "d2"], ["s", "s", "t"], inputs=["x", "y", "z"]
    )
    b = Connectivity.from_edges(["z", "y"], ["e0", "e1"], ["s", "t"], inputs=["x", "y", "z"])
    names = a.grow(b).labels
    assert names == Labels(("x", "y", "z"), ("d0", "d1", "e0", "d2", "e1"), ("s", "t"))
    plain = Connectivity.from_csr([0, 1, 2], [2, 1], 3)
    assert a.grow(plain).labels == Labels(("x", "y", "z"), None, ("s", "t"))
    assert plain.grow(a).labels is None
    image = Connectivity.from_csr([0, 1], [0], 4, in_shape=(1, 2, 2), channels_first=True)
    flat = Connectivity.from_csr([0, 1], [3], 4)
    assert (image.grow(flat).in_shape, image.grow(flat).channels_first) == ((1, 2, 2), True)
    assert flat.grow(image).in_shape is None


def test_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    c = small()
    with pytest.raises(TypeError, match="Expected Connectivity objects, got list"):
        c.grow([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected dendrites of 2 somas on 4 inputs, got 3 on 4"):
        c.grow(Connectivity.from_csr([0, 1, 2, 3], [0, 0, 0], 4))
    with pytest.raises(ValueError, match="Expected dendrites of 2 somas on 4 inputs, got 2 on 5"):
        c.grow(Connectivity.from_csr([0, 1, 2], [0, 0], 5))
    tall, wide = (Connectivity.from_csr([0, 1], [3], 4, in_shape=s) for s in [(4, 1), (1, 4)])
    with pytest.raises(ValueError, match=r"Expected dendrites on images \(4, 1\), got \(1, 4\)"):
        tall.grow(wide)
    monkeypatch.setattr(structure, "SIZE_LIMIT", 10)
    with pytest.raises(ValueError, match=r"Expected fewer than 2\*\*31 synapses, got 10"):
        c.grow(c)
