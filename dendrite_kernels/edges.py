"""The network behind `Connectivity.from_edges`: a table of edges, one synapse a row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ._columns import Column, inverse, numbered, weights
from ._validate import Array, Duplicates, check_duplicates, check_size
from .labels import Labels


class Table(NamedTuple):
    """Columns of one length."""

    pre: Any
    dendrite: Any
    soma: Any  # None: every dendrite is its own soma
    weight: Any  # or None


class Network(NamedTuple):
    """What a Connectivity is made of, and the weights in its order."""

    crow: Array  # [R + 1]
    columns: Array  # [nnz]
    soma_ptr: Array  # [S + 1]
    in_features: int
    labels: Labels
    weight: torch.Tensor | None  # [nnz]


def table_of(pre: Any, dendrite: Any, soma: Any, weight: Any) -> Table:
    """The columns given, or those of a dict, DataFrame or directed graph in place of `pre`."""
    if dendrite is not None:
        return Table(pre, dendrite, soma, weight)
    if soma is not None or weight is not None:
        raise ValueError("Expected dendrite beside soma and weight, got None")
    if hasattr(pre, "is_directed"):
        return _table_of_graph(pre)
    if type(pre).__name__ == "LazyFrame":
        raise TypeError("Expected a DataFrame, got a LazyFrame: give pre.collect()")
    if hasattr(pre, "columns") or isinstance(pre, Mapping):
        return _table_of_columns(pre, list(getattr(pre, "columns", pre)))
    raise TypeError(
        "Expected pre and dendrite, a dict of columns, a DataFrame or a networkx DiGraph, "
        f"got {type(pre).__name__} alone"
    )


def _table_of_columns(frame: Any, found: list[Any]) -> Table:
    if "pre" not in found or "dendrite" not in found:
        raise ValueError(f"Expected a table with columns 'pre' and 'dendrite', got {found}")
    return Table(*(frame[name] if name in found else None for name in Table._fields))


def _table_of_graph(graph: Any) -> Table:
    if not graph.is_directed():
        raise TypeError(f"Expected a directed graph, got {type(graph).__name__}")
    edges = list(graph.edges(data=True))
    targets = [v for _, v, _ in edges]
    nodes = [graph.nodes[v] for v in targets]
    soma = _attribute("soma", nodes, lambda i: f"node {targets[i]!r}")
    weight = _attribute(
        "weight", [d for *_, d in edges], lambda i: f"edge {edges[i][0]!r} -> {targets[i]!r}"
    )
    return Table([u for u, *_ in edges], targets, soma, weight)


def _attribute(
    name: str, owners: list[dict[str, Any]], called: Callable[[int], str]
) -> list[Any] | None:
    has = [name in owner for owner in owners]
    if not any(has):
        return None
    if not all(has):
        without = called(has.index(False))
        raise ValueError(f"Expected the attribute {name!r} on all or none, got none on {without}")
    return [owner[name] for owner in owners]


def network(table: Table, inputs: Any, duplicates: Duplicates) -> Network:
    """Number the labels, put the dendrites of each soma together, sort the edges."""
    check_duplicates(duplicates)
    pre, dendrite = numbered("pre", table.pre), numbered("dendrite", table.dendrite)
    soma = dendrite if table.soma is None else numbered("soma", table.soma)
    weight, dtype = (None, None) if table.weight is None else weights(table.weight)
    _check_lengths(pre.codes, dendrite.codes, soma.codes, pre.codes if weight is None else weight)

    columns, in_features, input_names = _inputs(pre, inputs)
    owner = _owners(dendrite, soma)
    order = np.argsort(owner, kind="stable")  # of the dendrites
    edge = inverse(order)[dendrite.codes] * in_features + columns  # < 2**62
    by_edge = np.argsort(edge, kind="stable")
    edge = edge[by_edge]
    new = np.diff(edge, prepend=-1) > 0  # where a synapse begins
    if duplicates == "refuse":
        _refuse_duplicates(pre, dendrite, by_edge[~new])
    rows, columns = np.divmod(edge[new], in_features)
    names = tuple(dendrite.names[i] for i in order.tolist())
    return Network(
        _pointer(rows, len(names)),
        columns,
        _pointer(owner, len(soma.names)),
        in_features,
        Labels(input_names, names, tuple(soma.names)),
        None if weight is None else _sums(weight[by_edge], new).to(dtype),
    )


def _check_lengths(*columns: Array) -> None:
    count = columns[0].size
    for name, column in zip(Table._fields, columns, strict=True):
        if column.size != count:
            raise ValueError(f"Expected {name} of length {count}, as pre, got {column.size}")
    if count == 0:
        raise ValueError("Expected at least one edge, got none")


def _refuse_duplicates(pre: Column, dendrite: Column, edges: Array) -> None:
    if edges.size:
        i = int(edges.min())
        labels = pre.names[pre.codes[i]], dendrite.names[dendrite.codes[i]]
        raise ValueError(
            f"Expected every edge once, got {labels[0]!r} -> {labels[1]!r} again in row {i}: "
            'duplicates="sum" makes it one synapse and adds weights'
        )


def _inputs(pre: Column, inputs: Any) -> tuple[Array, int, tuple[Hashable, ...] | None]:
    """The input of every edge, the number of inputs and their names."""
    if inputs is None:
        return pre.codes, len(pre.names), tuple(pre.names)
    if isinstance(inputs, (int, np.integer)):
        size, names = check_size("inputs", inputs), None
        positions = [i if type(i) is int and 0 <= i < size else -1 for i in pre.names]
        expected = f"pre to be integers in [0, {size})"
    else:
        known = numbered("inputs", inputs)
        size, names = known.codes.size, tuple(known.names)
        if len(names) < size:
            i = int((known.codes != np.arange(size)).argmax())
            raise ValueError(f"Expected distinct inputs, got {names[known.codes[i]]!r} twice")
        place = {label: i for i, label in enumerate(names)}
        positions = [place.get(label, -1) for label in pre.names]
        expected = "every label of pre in inputs"
    if -1 in positions:
        code = positions.index(-1)
        row = int((pre.codes == code).argmax())
        raise ValueError(f"Expected {expected}, got {pre.names[code]!r} in row {row}")
    return np.array(positions, np.int64)[pre.codes], size, names


def _owners(dendrite: Column, soma: Column) -> Array:
    """The soma of each dendrite [R]."""
    owner = np.empty(len(dendrite.names), np.int64)
    owner[dendrite.codes[::-1]] = soma.codes[::-1]  # the first edge, written last, decides
    expected = owner[dendrite.codes]
    if (expected != soma.codes).any():
        row = int((expected != soma.codes).argmax())
        label = dendrite.names[dendrite.codes[row]]
        somas = soma.names[expected[row]], soma.names[soma.codes[row]]
        raise ValueError(
            f"Expected every dendrite in one soma, got dendrite {label!r} in {somas[0]!r} and "
            f"{somas[1]!r} (row {row}): make labels unique, for example "
            'f"{soma}/{dendrite}"'
        )
    return owner


def _sums(weight: Array, new: Array) -> torch.Tensor:
    """Sorted weights, those of one synapse added."""
    if not new.all():
        weight = np.bincount(np.cumsum(new) - 1, weight)  # float64
    return torch.from_numpy(weight)


def _pointer(numbers: Array, count: int) -> Array:
    """Where each of `count` numbers begins among all, sorted [count + 1]."""
    return np.cumsum(np.append(0, np.bincount(numbers, minlength=count)))
