"""Properties of connectivities: every way to make one, and to keep it, gives the same synapses."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, packing
from tests.properties import strategies
from tests.properties.strategies import Draw


def same(made: Connectivity, c: Connectivity, labels: bool = True) -> None:
    """All that there is to compare, not only what `==` does."""
    assert made == c
    assert hash(made) == hash(c)
    assert made.digest == c.digest
    assert made.to_mask().equal(c.to_mask())
    assert made.soma_ptr.equal(c.soma_ptr)
    assert (made.in_shape, made.channels_first) == (c.in_shape, c.channels_first)
    for name in ("in_features", "num_dendrites", "num_somas", "nnz", "density", "fan_in"):
        assert getattr(made, name) == getattr(c, name), name
    assert made.dendrites_per_soma == c.dendrites_per_soma
    assert made.is_dense == c.is_dense
    assert not labels or made.labels == c.labels


def construction(draw: Draw) -> None:
    """From CSR arrays of any kind, a mask of any kind, a scipy matrix."""
    c = draw(strategies.networks(image=True))
    mask = c.to_mask()
    assert mask.sum() == c.nnz
    options: Any = {
        "soma_ptr": c.soma_ptr.tolist(),
        "in_shape": c.in_shape,
        "channels_first": c.channels_first,
    }
    if c.dendrites_per_soma and draw(st.booleans()):
        options |= {"soma_ptr": None, "dendrites_per_soma": c.dendrites_per_soma}
    kind = draw(st.sampled_from([list, np.asarray, torch.as_tensor]))
    columns = mask.nonzero()[:, 1]
    crow = np.cumsum([0, *mask.sum(1).tolist()])
    integer = draw(st.sampled_from([np.int32, np.int64, np.uint32]))
    arrays = kind(crow.astype(integer)), kind(columns.numpy().astype(integer))
    same(Connectivity.from_csr(*arrays, c.in_features, **options), c)
    same(Connectivity.from_mask(kind(mask.numpy()), in_features=c.in_features, **options), c)
    matrix = c.to_scipy()
    assert torch.from_numpy(matrix.toarray() != 0).equal(mask)
    form = draw(st.sampled_from(["csr", "csc", "coo", "lil", "dok"]))
    same(Connectivity.from_scipy(matrix.asformat(form), **options), c)


def edges(draw: Draw) -> None:
    """A shuffled table gives the same synapses, weights and somas under the labels it has."""
    c = draw(strategies.networks())
    rng = draw(strategies.generators)
    if not c.nnz:
        return
    pairs = c.to_mask().nonzero().numpy()[rng.permutation(c.nnz)]
    row, pre = pairs[:, 0], pairs[:, 1]
    soma = np.searchsorted(c.soma_ptr.numpy(), row, side="right") - 1
    weight = rng.standard_normal(c.nnz)
    made, ours = Connectivity.from_edges(pre, row, soma, weight, inputs=c.in_features)
    table = {(p, r, s): w for p, r, s, w in zip(pre, row, soma, weight, strict=True)}
    somas = made.labels.somas
    found = {}
    for r in range(made.num_dendrites):
        s = int(torch.searchsorted(made.soma_ptr, r, right=True)) - 1
        begin, end = made.crow_indices[r : r + 2].tolist()
        for k in range(begin, end):
            key = int(made.col_indices[k]), made.labels.dendrites[r], somas[s]
            found[key] = ours[k].item()
    assert found == table
    twice = np.append(pre, pre[0]), np.append(row, row[0]), np.append(soma, soma[0])
    with pytest.raises(ValueError, match=r"Expected .* got"):
        Connectivity.from_edges(*twice, inputs=c.in_features)
    both = np.append(weight, 1.0)
    summed, ours = Connectivity.from_edges(*twice, both, inputs=c.in_features, duplicates="sum")
    assert summed == made
    assert ours.sum().item() == pytest.approx(both.sum(), abs=1e-12 * np.abs(both).sum())


def kept(draw: Draw) -> None:
    """Files, pickles, copies and packed bytes give it back; a flipped byte is found."""
    c = draw(strategies.networks(image=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.npz")
        c.save(path)
        same(Connectivity.load(path), c)
    same(pickle.loads(pickle.dumps(c)), c)
    assert copy.deepcopy(c) is c
    packed = packing.pack(c)
    same(packing.unpack(packed, c.nnz), c)
    same(packing.unpack(packed.to(draw(st.sampled_from(strategies.FLOATS))), c.nnz), c)
    where = draw(st.integers(0, packed.numel() - 1))
    packed[where] ^= 1 << draw(st.integers(0, 7))
    with pytest.raises((TypeError, ValueError)):
        packing.unpack(packed, c.nnz)


def combination(draw: Draw) -> None:
    """Stacked networks are masks one above the other, others lie along the diagonal."""
    inputs = draw(st.integers(1, 40))
    parts = [draw(strategies.networks(inputs)) for _ in range(draw(st.integers(1, 3)))]
    masks = [part.to_mask() for part in parts]
    somas = np.cumsum([0, *(int(n) for part in parts for n in part.soma_ptr.diff())])
    stacked = Connectivity.stack(parts)
    same(stacked, Connectivity.from_mask(torch.cat(masks), soma_ptr=somas))
    diagonal = torch.block_diag(*masks).bool()
    same(Connectivity.block_diagonal(parts), Connectivity.from_mask(diagonal, soma_ptr=somas))


def chain(draw: Draw) -> None:
    """Rows own consecutive inputs, each one row."""
    inputs = draw(st.integers(1, 90))
    pointer = draw(strategies.soma_pointers(inputs))
    c = dk.connectivity.chain(pointer)
    mask = np.zeros((len(pointer) - 1, inputs), bool)
    for row in range(len(pointer) - 1):
        mask[row, pointer[row] : pointer[row + 1]] = True
    same(c, Connectivity.from_mask(mask))
