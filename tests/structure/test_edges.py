"""Connectivity.from_edges against a plain loop over the table; the labels that it leaves."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels.labels import Labels
from dendrite_kernels.structure import Connectivity

from_edges = Connectivity.from_edges

Edge = tuple[Hashable, Hashable, Hashable, float]  # pre, dendrite, soma, weight


def by_label(c: Connectivity, weight: Any) -> dict[Hashable, dict[Hashable, dict[Hashable, float]]]:
    """soma -> dendrite -> input -> weight, read from the tensors alone, in their order."""
    assert c.labels is not None
    inputs = c.labels.inputs or tuple(range(c.in_features))
    dendrites, somas = c.labels.dendrites, c.labels.somas
    assert dendrites is not None
    assert somas is not None
    crow, col, ptr = (t.tolist() for t in (c.crow_indices, c.col_indices, c.soma_ptr))
    values = weight.tolist()
    return {
        somas[s]: {
            dendrites[r]: {inputs[col[k]]: values[k] for k in range(crow[r], crow[r + 1])}
            for r in range(ptr[s], ptr[s + 1])
        }
        for s in range(c.num_somas)
    }


def oracle(edges: list[Edge]) -> dict[Hashable, dict[Hashable, dict[Hashable, float]]]:
    """The same from a loop over the table."""
    found: dict[Hashable, dict[Hashable, dict[Hashable, float]]] = {}
    for pre, dendrite, soma, weight in edges:
        row = found.setdefault(soma, {}).setdefault(dendrite, {})
        row[pre] = row.get(pre, 0) + weight
    return found


def assert_is_table(c: Connectivity, weight: Any, edges: list[Edge]) -> None:
    got, expected = by_label(c, weight), oracle(edges)
    assert got == expected
    assert list(got) == list(expected)  # somas, then their dendrites, in order of appearance
    assert [list(d) for d in got.values()] == [list(d) for d in expected.values()]


def random_table(seed: int, label: Callable[[str, int], Hashable]) -> list[Edge]:
    """Up to 300 edges, some more than once; weights are small integers, so sums are exact."""
    rng = np.random.default_rng(seed)
    count, inputs, dendrites, somas = rng.integers(1, [300, 30, 20, 9])
    owner = rng.integers(0, somas, dendrites)
    pre, dendrite = rng.integers(0, inputs, count), rng.integers(0, dendrites, count)
    return [
        (label("i", int(i)), label("d", int(d)), label("s", int(owner[d])), float(w))
        for i, d, w in zip(pre, dendrite, rng.integers(-9, 10, count), strict=True)
    ]


LABELS: dict[str, Callable[[str, int], Hashable]] = {
    "int": lambda kind, i: 1000 - 7 * i,
    "str": lambda kind, i: f"{kind}{i}",
    "tuple": lambda kind, i: (kind, i),
    "mixed": lambda kind, i: i if i % 2 else str(i),
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("seed", range(5))
def test_random_tables(label: Callable[[str, int], Hashable], seed: int) -> None:
    edges = random_table(seed, label)
    pre, dendrite, soma, weight = zip(*edges, strict=True)
    columns: Any = [pre, dendrite, soma, weight]
    c, values = from_edges(*map(iter, columns) if seed == 0 else columns, duplicates="sum")
    assert_is_table(c, values, edges)
    assert values.dtype == torch.float32
    assert c.labels.inputs == tuple(dict.fromkeys(pre))
    assert c.in_features == len(set(pre))


@pytest.mark.parametrize("seed", range(3))
def test_random_positions(seed: int) -> None:
    edges = random_table(seed, lambda kind, i: i)
    columns = [np.array(column) for column in zip(*edges, strict=True)]
    c, values = from_edges(*columns, inputs=40, duplicates="sum")
    assert_is_table(c, values, edges)
    assert c.in_features == 40
    assert c.labels.inputs is None
    mask = np.zeros((c.num_dendrites, 40), bool)
    for pre, dendrite, *_ in edges:
        mask[c.labels.dendrites.index(dendrite), int(pre)] = True
    assert np.array_equal(c.to_mask().numpy(), mask)


def test_a_small_table() -> None:
    """Dendrites of somas that alternate in the table come to lie together."""
    pre, dendrite = ["b", "a", "c", "a", "b"], ["x1", "y1", "x2", "x1", "y1"]
    c, weight = from_edges(pre, dendrite, ["x", "y", "x", "x", "y"], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert c.labels == Labels(("b", "a", "c"), ("x1", "x2", "y1"), ("x", "y"))
    assert c == Connectivity.from_csr([0, 2, 3, 5], [0, 1, 2, 0, 1], 3, soma_ptr=[0, 2, 3])
    assert weight.tolist() == [1, 4, 3, 5, 2]
    layer = dk.SparseLinear(c, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert layer(torch.tensor([1.0, 10.0, 100.0])).tolist() == [41, 300, 25]


def test_without_somas_every_dendrite_is_its_own() -> None:
    c = from_edges([0, 1, 0], ["p", "q", "q"])
    assert isinstance(c, Connectivity)
    assert c.soma_ptr.tolist() == [0, 1, 2]
    assert c.labels == Labels((0, 1), ("p", "q"), ("p", "q"))


def test_inputs() -> None:
    c = from_edges(["b", "a"], [1, 2], inputs=["a", "unused", "b"])
    assert (c.in_features, c.col_indices.tolist()) == (3, [2, 0])
    assert c.labels.inputs == ("a", "unused", "b")
    image = from_edges([5, 0], [1, 2], inputs=12, in_shape=(3, 2, 2), channels_first=True)
    assert (image.in_shape, image.channels_first) == ((3, 2, 2), True)
    assert from_edges([5, 0], [1, 2], inputs=np.int64(12)) == image


# Sources


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, np.array, torch.tensor, lambda v: np.array(v, object)]
)
def test_sequences(kind: Callable[[list[int]], Any]) -> None:
    c = from_edges(kind([7, 9, 7]), kind([3, 3, 2]), kind([1, 1, 0]))
    assert c.labels == Labels((7, 9), (3, 2), (1, 0))
    for names in c.labels:
        assert {type(name) for name in names} == {int}
    assert c == Connectivity.from_csr([0, 2, 3], [0, 1, 0], 2)


def test_lists_keep_labels_that_numpy_would_mix_up() -> None:
    c = from_edges([("a", 1), ("a", 2), "a"], [1, "1", 2.5])
    assert c.labels.inputs == (("a", 1), ("a", 2), "a")
    assert c.labels.dendrites == (1, "1", 2.5)


COLUMNS = {
    "dendrite": ["d0", "d1", "d0"], "weight": [1.5, 2.0, 3.0], "pre": ["a", "a", "b"],
    "soma": [4, 4, 4], "synapse": [0, 1, 2],
}  # fmt: skip


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_frames(package: str) -> None:
    frame = pytest.importorskip(package).DataFrame(COLUMNS)
    c, weight = from_edges(frame)
    assert c.labels == Labels(("a", "b"), ("d0", "d1"), (4,))
    assert (weight.dtype, weight.tolist()) == (torch.float64, [1.5, 3.0, 2.0])
    again, weight = from_edges(frame["pre"], frame["dendrite"], frame["soma"], frame["weight"])
    assert (again, again.labels, weight.tolist()) == (c, c.labels, [1.5, 3.0, 2.0])
    assert from_edges(frame[["pre", "dendrite"]]).num_somas == 2
    with pytest.raises(ValueError, match=r"columns 'pre' and 'dendrite', got \['pre', 'soma'\]"):
        from_edges(frame[["pre", "soma"]])
    with pytest.raises(ValueError, match="Expected dendrite beside soma and weight, got None"):
        from_edges(frame, weight=[1, 2, 3])


def test_a_dict_of_columns() -> None:
    c, weight = from_edges(COLUMNS)
    assert c.labels == Labels(("a", "b"), ("d0", "d1"), (4,))
    assert weight.tolist() == [1.5, 3.0, 2.0]
    with pytest.raises(ValueError, match=r"columns 'pre' and 'dendrite', got \['pre'\]"):
        from_edges({"pre": COLUMNS["pre"]})


def test_lazy_frames_are_refused_by_name() -> None:
    lazy = pytest.importorskip("polars").DataFrame(COLUMNS).lazy()
    with pytest.raises(TypeError, match=r"Expected a DataFrame, got a LazyFrame: .*collect\(\)"):
        from_edges(lazy)


@pytest.mark.parametrize("package", ["pandas", "polars"])
@pytest.mark.parametrize("column", ["pre", "dendrite", "soma", "weight"])
def test_missing_values_in_frames(package: str, column: str) -> None:
    frame = pytest.importorskip(package).DataFrame
    values: list[Any] = list(COLUMNS[column])
    values[2] = None
    with pytest.raises(ValueError, match=rf"no missing value in {column}, got \w+ in row 2"):
        from_edges(frame(COLUMNS | {column: values}))


def test_structs_of_polars_are_no_labels() -> None:
    polars = pytest.importorskip("polars")
    pre = polars.Series([{"x": 1, "y": 2}, {"x": 1, "y": 3}])
    with pytest.raises(ValueError, match=r"pre to be one-dimensional, got shape \[2, 2\]"):
        from_edges(pre, ["p", "q"])


def test_nullable_pandas_columns() -> None:
    pandas = pytest.importorskip("pandas")
    whole = pandas.Series([3, 1, 3], dtype="Int64")
    assert from_edges(whole, [0, 1, 2]).labels.inputs == (3, 1)
    missing = pandas.Series([3, 1, None], dtype="Int64")
    for column in (missing, missing.astype(object)):
        with pytest.raises(ValueError, match=r"no missing value in pre, got .* in row 2"):
            from_edges(column, [0, 1, 2])
    with pytest.raises(ValueError, match=r"no missing value in weight, got .* in row 2"):
        from_edges(whole, [0, 1, 2], weight=missing)


def test_graph() -> None:
    networkx = pytest.importorskip("networkx")
    graph = networkx.DiGraph()
    graph.add_nodes_from(["d0", "d1", "d2"], soma="s")
    graph.add_edge("in1", "d1", weight=2)
    graph.add_edge("in0", "d1", weight=0.5)
    graph.add_edge("in0", "d0", weight=3)
    c, weight = from_edges(graph)
    assert_is_table(
        c, weight, [("in1", "d1", "s", 2), ("in0", "d1", "s", 0.5), ("in0", "d0", "s", 3)]
    )
    assert weight.dtype == torch.float32
    assert from_edges(graph, inputs=["in0", "in1", "in2"])[0].in_features == 3
    graph.add_edge("in1", "d2")
    with pytest.raises(ValueError, match="'weight' on all or none, got none on edge 'in1' -> 'd2'"):
        from_edges(graph)
    graph["in1"]["d2"]["weight"] = None
    with pytest.raises(ValueError, match="no missing value in weight, got None in row"):
        from_edges(graph)
    graph["in1"]["d2"]["weight"] = 1
    graph.add_edge("in1", "d3", weight=1)
    with pytest.raises(ValueError, match="'soma' on all or none, got none on node 'd3'"):
        from_edges(graph)


def test_graph_without_attributes() -> None:
    networkx = pytest.importorskip("networkx")
    c = from_edges(networkx.DiGraph([(0, 1), (0, 2), (2, 1)]))
    assert c.labels == Labels((0, 2), (1, 2), (1, 2))  # node 2 is an input and a dendrite
    with pytest.raises(TypeError, match="Expected a directed graph, got Graph"):
        from_edges(networkx.Graph([(0, 1)]))
    with pytest.raises(ValueError, match="every edge once, got 0 -> 1 again in row 1"):
        from_edges(networkx.MultiDiGraph([(0, 1), (0, 1)]))


# Weights


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (torch.tensor([3.0, 4.0], requires_grad=True), torch.float32),
        (np.array([3.0, 4.0], np.float32), torch.float32),
        (np.array([3.0, 4.0]), torch.float64),
        (np.array([3, 4], np.uint16), torch.float32),
        (torch.tensor([3, 4]), torch.float32),
        ([3, 4], torch.float32),
        ([3.0, 4.0], torch.float32),
        ({"a": 3.0, "b": 4.0}.values(), torch.float32),
    ],
)
@pytest.mark.parametrize("duplicates", ["refuse", "sum"])
def test_dtype_of_weights(weight: Any, dtype: torch.dtype, duplicates: Any) -> None:
    _, values = from_edges([1, 0], [0, 0], weight=weight, inputs=2, duplicates=duplicates)
    assert (values.dtype, values.tolist()) == (dtype, [4, 3])
    assert not values.requires_grad
    values.zero_()
    assert list(weight) == [3, 4]  # belongs to the caller


def test_integer_weights_take_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert from_edges([0], [0], weight=[1])[1].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_sum_adds_weights(dtype: type) -> None:
    weight = np.array([1, 2, 4, 8, 16], dtype)
    c, values = from_edges(list("abaab"), [0, 0, 0, 1, 0], weight=weight, duplicates="sum")
    assert c == Connectivity.from_csr([0, 2, 3], [0, 1, 0], 2)
    assert values.tolist() == [5, 18, 8]
    assert values.dtype == (torch.float64 if dtype == np.float64 else torch.float32)
    assert from_edges(list("abaab"), [0, 0, 0, 1, 0], duplicates="sum") == c


# Errors

GOOD: dict[str, Any] = {"pre": ["a", "b", "a"], "dendrite": [0, 0, 1], "soma": ["s", "s", "t"]}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pre": ["a", "b", "a", "b", "a"], "dendrite": [0, 0, 1, 1, 0], "soma": list("sstts")},
     ValueError, "every edge once, got 'a' -> 0 again in row 4: duplicates=\"sum\""),
    ({"soma": ["s", "t", "t"]}, ValueError,
     r"in one soma, got dendrite 0 in 's' and 't' \(row 1\): .* f\"\{soma\}/\{dendrite\}\""),
    ({"pre": ["a", None, "a"]}, ValueError, "no missing value in pre, got None in row 1"),
    ({"pre": [0.0, 1.0, math.nan]}, ValueError, "no missing value in pre, got nan in row 2"),
    ({"pre": np.array([0, 1, math.nan])}, ValueError, "in pre, got nan in row 2"),
    ({"dendrite": [None, 0, 1]}, ValueError, "no missing value in dendrite, got None in row 0"),
    ({"soma": ["s", "s", None]}, ValueError, "no missing value in soma, got None in row 2"),
    ({"pre": np.ma.masked_array([0, 1, 2], [0, 1, 0])}, ValueError, r"masked at \[1\]"),
    ({"soma": np.ma.masked_array(["s", "s", "t"], [0, 0, 1])}, ValueError, r"masked at \[2\]"),
    ({"weight": np.ma.masked_array(np.ones(3), [1, 0, 0])}, ValueError, r"masked at \[0\]"),
    ({"pre": list(torch.tensor([1, 1, 2]))}, TypeError, r"labels in pre, got 1 .* use tolist\(\)"),
    ({"weight": [1, 2, None]}, ValueError, "no missing value in weight, got None in row 2"),
    ({"weight": [1, math.nan, 2]}, ValueError, "no missing value in weight, got nan in row 1"),
    ({"weight": ["1", "2", "3"]}, TypeError, "weight of float32, .* got <U1"),
    ({"weight": np.ones(3, np.float16)}, TypeError, "weight of float32, .* got float16"),
    ({"weight": torch.ones(3).half()}, TypeError, "weight of float32, .* got torch.float16"),
    ({"weight": torch.ones(3).bfloat16()}, TypeError, "weight of float32, .* got torch.bfloat16"),
    ({"pre": torch.ones(3).bfloat16()}, TypeError, "dtype that numpy has, got torch.bfloat16"),
    ({"weight": [True, False, True]}, TypeError, "weight of float32, .* got bool"),
    ({"weight": np.ones((3, 1))}, ValueError, r"weight to be one-dimensional, got shape \[3, 1\]"),
    ({"weight": [1, 2]}, ValueError, "weight of length 3, as pre, got 2"),
    ({"soma": ["s"] * 4}, ValueError, "soma of length 3, as pre, got 4"),
    ({"dendrite": [0, 0]}, ValueError, "dendrite of length 3, as pre, got 2"),
    ({"dendrite": "abc"}, TypeError, "dendrite to be a sequence of labels, got str"),
    ({"dendrite": 3}, TypeError, "dendrite to be a sequence of labels, got int"),
    ({"pre": {"a", "b", "c"}}, TypeError, "pre to be a sequence of labels, got set"),
    ({"pre": np.zeros((3, 1))}, ValueError, r"pre to be one-dimensional, got shape \[3, 1\]"),
    ({"pre": ["a", ["b"], "c"]}, TypeError, "hashable labels in pre: .*list"),
    ({"pre": [], "dendrite": [], "soma": []}, ValueError, "at least one edge, got none"),
    ({"dendrite": None}, ValueError, "dendrite beside soma and weight, got None"),
    ({"dendrite": None, "soma": None}, TypeError, "a DataFrame or .* DiGraph, got list alone"),
    ({"inputs": ["b", "c"]}, ValueError, "every label of pre in inputs, got 'a' in row 0"),
    ({"inputs": ["a", "b", "a"]}, ValueError, "distinct inputs, got 'a' twice"),
    ({"inputs": ["a", None]}, ValueError, "no missing value in inputs, got None in row 1"),
    ({"inputs": "ab"}, TypeError, "inputs to be a sequence of labels, got str"),
    ({"inputs": 2}, ValueError, r"pre to be integers in \[0, 2\), got 'a' in row 0"),
    ({"inputs": 2, "pre": [1, 2, 1]}, ValueError, r"in \[0, 2\), got 2 in row 1"),
    ({"inputs": 2, "pre": [0, 1, -1]}, ValueError, r"in \[0, 2\), got -1 in row 2"),
    ({"inputs": 2, "pre": [0, 1.0, 0]}, ValueError, r"in \[0, 2\), got 1.0 in row 1"),
    ({"inputs": 0}, ValueError, "inputs from 1 to .* got 0"),
    ({"inputs": True}, TypeError, "inputs to be an integer, got True"),
    ({"duplicates": "keep"}, ValueError, "duplicates='refuse' or 'sum', got 'keep'"),
    ({"in_shape": (3, 1)}, ValueError, r"in_shape .* with product 2, got \(3, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_tables(change: dict[str, Any], error: type[Exception], message: str) -> None:
    from_edges(**GOOD)
    with pytest.raises(error, match=f"Expected .*{message}"):
        from_edges(**(GOOD | change))


# Labels


def labelled() -> Connectivity:
    """4 inputs, somas "x" of dendrites 1 and "2", and "y" of dendrite 3."""
    c: Connectivity = from_edges(
        ["a", "b", "c"], [1, "2", 3], ["x", "x", "y"], inputs=list("abcd"), in_shape=(2, 2)
    )
    return c


def test_labels_take_no_part_in_equality_and_hash() -> None:
    c = labelled()
    plain = Connectivity.from_csr([0, 1, 2, 3], [0, 1, 2], 4, soma_ptr=[0, 2, 3])
    assert plain.labels is None
    assert c == plain
    assert hash(c) == hash(plain)


def test_labels_in_repr() -> None:
    text = "labels=(inputs 'a', 'b', ...; dendrites 1, '2', ...; somas 'x', 'y'))"
    assert repr(labelled()).endswith(f"in_shape=(2, 2), {text}")
    assert "inputs" not in repr(from_edges([0], [0], inputs=1)).partition("labels=")[2]
    assert "labels" not in repr(Connectivity.from_csr([0, 1], [0], 1))
    assert len(repr(from_edges(["long" * 1000], ["label" * 1000]))) < 400


def test_labels_of_the_constructor() -> None:
    pattern: Any = [0, 1], [0], [0, 1], 2
    c = Connectivity(*pattern, labels=[np.array(["a", "b"]), None, ["s"]])
    assert c.labels == (("a", "b"), None, ("s",))
    assert type(c.labels.inputs[0]) is str
    assert Connectivity(*pattern, labels=[None] * 3).labels is None
    with pytest.raises(ValueError, match="Expected labels of 2 inputs, got 3"):
        Connectivity(*pattern, labels=["abc", None, None])
    with pytest.raises(ValueError, match="Expected labels of 1 somas, got 0"):
        Connectivity(*pattern, labels=[None, None, []])


def test_pickles_keep_labels() -> None:
    for c in (labelled(), from_edges([("a", 1)], [None.__class__])):
        back = pickle.loads(pickle.dumps(c))
        assert back.labels == c.labels
        assert type(back.labels) is Labels
    file = io.BytesIO()
    torch.save(labelled(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).labels == labelled().labels


def test_files_keep_labels(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    for c in (labelled(), from_edges([1, 0], ["ä\ud800", ""], inputs=2), labelled()):
        c.save(path)
        back = Connectivity.load(path)
        assert (back, back.labels) == (c, c.labels)
        assert type(back.labels) is Labels
    for label in (("a", 1), 1.5, True, b"a"):
        with pytest.raises(TypeError, match=r"labels of type str or int to save, got .* dendrites"):
            from_edges(["a", "b"], ["d", label]).save(path)
    assert Connectivity.load(path).labels == labelled().labels  # the old file is whole
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "labels",
    [
        "[", "3", "[]", '{"inputs": ["a"]}', '{"other": null}', '{"inputs": "abcd"}',
        '{"inputs": [1, 2, 3, 4.5]}', '{"inputs": [1, 2, 3, []]}', "[" * 100_000,
    ],
)  # fmt: skip
def test_load_checks_labels(tmp_path: Path, labels: str) -> None:
    path = tmp_path / "c.npz"
    labelled().save(path)
    arrays = dict(np.load(path))
    assert json.loads(arrays["labels"].tobytes())["inputs"] == list("abcd")
    arrays["labels"] = np.frombuffer(labels.encode(), np.uint8)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"written by Connectivity.save, got .*c\.npz"):
        Connectivity.load(path)


def test_a_damaged_directory_hides_nothing(tmp_path: Path) -> None:
    """One bit of the flags, the lengths or the name of any array in it."""
    path, c = tmp_path / "c.npz", labelled()
    c.save(path)
    whole = path.read_bytes()
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", whole)]
    assert len(entries) == 9
    for place in (entry + offset for entry in entries for offset in (8, *range(28, 34), 46)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with contextlib.suppress(ValueError):
                assert Connectivity.load(path).labels == c.labels


def test_stack_and_labels() -> None:
    a, b = labelled(), from_edges([2, 0], ["d", "e"], inputs=4)
    both = Connectivity.stack([a, a])
    assert both.labels == Labels(tuple("abcd"), (1, "2", 3) * 2, ("x", "y") * 2)
    assert Connectivity.stack([a, b]).labels == Labels(
        None, (1, "2", 3, "d", "e"), ("x", "y", "d", "e")
    )
    plain = Connectivity.from_csr([0, 1], [0], 4)
    assert Connectivity.stack([a, plain]).labels is None
    assert Connectivity.block_diagonal([a, a]).labels == Labels(tuple("abcd") * 2, *both.labels[1:])
    assert Connectivity.block_diagonal([a, b]).labels.inputs is None  # type: ignore[union-attr]


def test_plot_shows_labels() -> None:
    pytest.importorskip("matplotlib")
    titles = [panel.get_title() for panel in labelled().plot().axes]
    assert titles == ["x: 2 dendrites", "y: 1 dendrite"]
    maths = from_edges([0], [0], ["$\\bad$"], inputs=4, in_shape=(2, 2)).plot()
    maths.savefig(io.BytesIO())
    assert maths.axes[0].get_title() == "$\\bad$: 1 dendrite"


def test_layers_share_the_labels_but_state_dicts_have_none() -> None:
    layer = dk.SparseLinear(labelled())
    assert layer.connectivity.labels == labelled().labels
    plain = dk.SparseLinear(Connectivity.from_csr([0, 1, 2, 3], [0, 1, 2], 4, [0, 2, 3]))
    plain.load_state_dict(layer.state_dict())
    assert plain.connectivity.labels is None
    layer.load_state_dict(plain.state_dict())
    assert layer.connectivity.labels == labelled().labels
