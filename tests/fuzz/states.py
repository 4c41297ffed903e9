"""Fuzz targets: hostile states for layers, and tables of anything for `from_edges`."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, plasticity
from tests.fuzz.loaders import check, mixed
from tests.fuzz.source import Source


def tree() -> dk.DendriticTree:
    return dk.DendriticTree(dk.connectivity.random(6, 2, 4, 3, seed=0), [2, 2])


def hostile(source: Source, good: Any) -> Any:
    """A value in the place of a good one."""
    if not isinstance(good, torch.Tensor):
        return good
    n = good.numel()
    changes: list[Callable[[], Any]] = [
        lambda: good[: source.below(n + 1)],
        lambda: good.repeat(source.below(3)),
        lambda: good.to(source.pick((torch.float64, torch.bfloat16, torch.int64, torch.bool))),
        lambda: good.to(torch.complex64),
        lambda: good.to("meta"),
        lambda: good.to_sparse(),
        lambda: good[None],
        lambda: good.flip(0),
        lambda: good.new_zeros(()),
        lambda: good[:1].expand(n),
        lambda: good.numpy(),
        lambda: good.tolist(),
        lambda: None,
        lambda: "text",
        lambda: {"crow_indices": good, "in_features": source.pick((4, 2**70, 4.5, "4", np.inf))},
        lambda: {
            "crow_indices": [0, 2, 2, source.below(8)],
            "col_indices": [1, 3, 0, 1, source.below(5)],
            "soma_ptr": [0, source.below(5), 3],
            "in_features": source.pick((4, torch.tensor(4), torch.tensor([4, 4]), np.nan, 0)),
        },
        lambda: changed(good, source),
    ]
    return source.pick(changes)()


def changed(good: torch.Tensor, source: Source) -> torch.Tensor:
    """Some bytes of it."""
    data = bytearray(good.contiguous().numpy().tobytes())
    for _ in range(source.below(8)):
        data[source.below(len(data))] = source.below(256)
    if good.dtype == torch.uint8 and len(data) >= 24:
        struct.pack_into("<q", data, 16, zlib.crc32(data[24:]))
    return torch.frombuffer(data, dtype=good.dtype).reshape(good.shape)


STATES: list[Callable[[], Any]] = [lambda: mixed()[0], lambda: mixed()[2], tree]


def state(data: bytes) -> None:
    """A layer refuses a state and stays as it was, or it is that of the state."""
    source = Source(data)
    make = source.pick(STATES)
    layer, good = make(), dict(make().state_dict())
    entries: dict[Any, Any] = dict(good)
    for _ in range(1 + source.below(3)):
        key = source.pick(sorted(good))
        entries[key] = hostile(source, good[key])
        if source.below(4) == 0:
            entries[source.pick(("cable.7", "level_weight.1", "bias.0", "x"))] = good[key]
    way = source.below(3)
    if way == 0:
        c = layer.connectivity
        with contextlib.suppress(RuntimeError):
            layer.load_state_dict(entries)
        assert layer.connectivity is c
    elif way == 1:
        with contextlib.suppress(ValueError, TypeError):
            check(type(layer).from_state_dict(entries).connectivity)
    elif not isinstance(layer, dk.DendriticTree):
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        try:
            plasticity.adopt(layer, entries)
        except (ValueError, TypeError):
            after = layer.state_dict()
            assert all(torch.equal(after[name], value) for name, value in before.items())
        check(layer.connectivity)


LABELS: tuple[Any, ...] = (
    0, 1, 2, -1, 2**31, 2**80, 0.5, float("nan"), float("inf"), True, None, "", "a", "b", b"a",
    (), (1,), [], {}, torch.tensor(1), np.int8(1), np.float32(2), np.datetime64("NaT"), 1j,
)  # fmt: skip


def table(data: bytes) -> None:
    """`from_edges` of columns of anything, as lists, arrays or tensors."""
    source = Source(data)

    def column() -> Any:
        values = [source.pick(LABELS[: 3 + source.below(len(LABELS) - 2)])] * source.below(3)
        values += [source.pick(LABELS) for _ in range(source.below(4))]
        as_is: tuple[Callable[[Any], Any], ...] = (
            list, tuple, iter, lambda v: np.array(v, object), lambda v: np.array(list(map(str, v))),
            lambda v: torch.arange(len(v)),
            lambda v: np.arange(len(v), dtype=source.pick(("i4", "u1", "f4"))),
            lambda v: None, str, len,
        )  # fmt: skip
        return source.pick(as_is)(values)

    columns = {name: column() for name in ("pre", "dendrite", "soma", "weight")}
    options = {
        "inputs": source.pick((None, 0, 3, 2**31, True, 1.5, "ab", ["a", "b"], column())),
        "duplicates": source.pick(("refuse", "sum", None, [])),
        "in_shape": source.pick((None, (1, 3), (3, 1, 1), (2**31 - 1,) * 3, "ab", 3)),
        "channels_first": source.pick((False, True)),
    }
    with contextlib.suppress(ValueError, TypeError):
        made = Connectivity.from_edges(**columns, **options)
        check(made if isinstance(made, Connectivity) else made[0])
