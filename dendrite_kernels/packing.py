"""A Connectivity as one tensor of bytes: what the state dict of a layer carries.

Tools that take tensors only (safetensors, Hub, federated averaging) take this one too. It is not a
buffer: `.half()`, DDP's broadcasts, EMA of buffers and `to(device)` leave it alone, and a layer on
the meta device has it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ._validate import SIZE_LIMIT, Array
from .structure import Connectivity

_MAGIC = int.from_bytes(b"dendrite", "little")
_VERSION = 2
_FIELDS = (  # the checksum is of all that follows it
    "magic", "version", "checksum", "in_features", "num_dendrites", "num_somas", "nnz", "fan_in",
    "dendrites_per_soma", "channels_first", "dimensions", "size_0", "size_1", "size_2",
)  # fmt: skip
_HEADER = 8 * len(_FIELDS)
_CHECKED = 8 * 3  # where what the checksum covers begins
_CAUSE = (
    "it is damaged, or an average or a sum of states: sums in uint8 wrap. "
    "Average only entries that are floating point and take the others from one of the states"
)


@unset_fake_temporarily()
def pack(c: Connectivity) -> torch.Tensor:
    """A new uint8 tensor: sizes, then the arrays that sizes do not tell.

    crow and soma_ptr where their steps vary, columns unless all-to-all; 2 bytes for each column if
    in_features <= 65536, else 4.
    """
    shape = c.in_shape or ()
    header = [
        _MAGIC, _VERSION, 0, c.in_features, c.num_dendrites, c.num_somas, c.nnz, c.fan_in or 0,
        c.dendrites_per_soma or 0, c.channels_first, len(shape), *shape, *[0] * (3 - len(shape)),
    ]  # fmt: skip
    parts = [np.array(header, "<i8")]
    if not c.fan_in:  # rows of no synapses are spelt out: a short tensor must not claim many
        parts.append(c.crow_indices.numpy().astype("<i4", copy=False))
    if not c.dendrites_per_soma:
        parts.append(c.soma_ptr.numpy().astype("<i4", copy=False))
    if not c.is_dense:
        parts.append(c.columns.astype(_column_type(c.in_features), copy=False))
    packed = np.concatenate([part.view(np.uint8) for part in parts])
    _seal(packed)
    return torch.from_numpy(packed)


@unset_fake_temporarily()
def unpack(packed: object, nnz: int) -> Connectivity:
    """The Connectivity that `pack` made `packed` of, validated anew.

    Args:
        packed: its values may be of another dtype, or off by less than 0.1, as after averaging.
        nnz: how many weights there are: nothing larger is allocated.

    Raises:
        TypeError, ValueError: not such a tensor, damaged, of a newer version, or of another nnz.
    """
    data = _bytes(packed)
    if data.size < _HEADER:
        raise ValueError(f"Expected a packed Connectivity, got {data.size} bytes")
    h = dict(zip(_FIELDS, data[:_HEADER].view("<i8").tolist(), strict=True))
    if h["magic"] != _MAGIC:
        raise ValueError(f"Expected a packed Connectivity, got other bytes: {_CAUSE}")
    if h["version"] != _VERSION:
        raise ValueError(
            f"Expected a Connectivity packed by version {_VERSION}, got {h['version']}"
        )
    if h["checksum"] != zlib.crc32(data[_CHECKED:].data):
        raise ValueError(f"Expected a packed Connectivity, got changed bytes: {_CAUSE}")
    n, rows, somas = h["in_features"], h["num_dendrites"], h["num_somas"]
    if h["nnz"] != nnz:
        raise ValueError(f"Expected a Connectivity of {nnz} synapses, got {h['nnz']}")
    if not all(1 <= size < SIZE_LIMIT for size in (n, rows, somas)) or not 0 <= h["dimensions"] < 4:
        raise ValueError("Expected a packed Connectivity, got sizes that none has")
    rest = _Reader(data[_HEADER:])
    crow = rest.pointer(rows, nnz, h["fan_in"])
    soma_ptr = rest.pointer(somas, rows, h["dendrites_per_soma"])
    if nnz == rows * n:
        columns: Array = np.tile(np.arange(n, dtype=np.int32), rows)
    else:
        columns = rest.take(nnz, _column_type(n)).astype(np.int32)
    rest.end()
    shape = [h[f"size_{i}"] for i in range(h["dimensions"])] or None
    return Connectivity(crow, columns, soma_ptr, n, shape, channels_first=bool(h["channels_first"]))


def pack_all(parts: Sequence[Connectivity]) -> torch.Tensor:
    """Several, one after the other: a new uint8 tensor that begins with their sizes in bytes."""
    packed = [pack(part) for part in parts]
    sizes = np.array([part.numel() for part in packed], "<i8")
    with unset_fake_temporarily():
        return torch.cat([torch.from_numpy(sizes.view(np.uint8)), *packed])


def unpack_all(packed: object, nnz: Sequence[int]) -> list[Connectivity]:
    """What `pack_all` made `packed` of; `nnz` of each, as for `unpack`."""
    data = _Reader(_bytes(packed))
    sizes = data.take(len(nnz), "<i8").tolist()
    if min(sizes) < 0 or sum(sizes) != data.data.size:
        raise ValueError(f"Expected {len(nnz)} packed Connectivities, got other bytes: {_CAUSE}")
    with unset_fake_temporarily():
        parts = [torch.from_numpy(data.take(size, "u1").copy()) for size in sizes]
    return [unpack(part, count) for part, count in zip(parts, nnz, strict=True)]


def difference(expected: Connectivity, got: Connectivity) -> str:
    """How two connectivities differ, where reprs may look alike: the first thing that does."""
    for name in ("in_features", "num_dendrites", "num_somas", "nnz"):
        a, b = getattr(expected, name), getattr(got, name)
        if a != b:
            return f"Expected {name}={a}, got {b}"
    a, b = expected.soma_ptr, got.soma_ptr
    if not torch.equal(a, b):
        s = int((a != b).nonzero()[0]) - 1
        return f"Expected soma {s} to own dendrites {_span(a, s)}, got {_span(b, s)}"
    a, b = expected.crow_indices, got.crow_indices
    if not torch.equal(a, b):
        row = int((a != b).nonzero()[0]) - 1
    else:
        other = expected.col_indices != got.col_indices
        if not bool(other.any()):
            return "Expected another connectivity, got an equal one"
        row = int(torch.searchsorted(a, int(other.nonzero()[0]), right=True)) - 1
    return f"Expected dendrite {row} on inputs {_inputs(expected, row)}, got {_inputs(got, row)}"


def _span(pointer: torch.Tensor, i: int) -> str:
    return f"{int(pointer[i])}:{int(pointer[i + 1])}"


def _inputs(c: Connectivity, row: int) -> str:
    begin, end = c.crow_indices[row : row + 2].tolist()
    shown = c.col_indices[begin : min(end, begin + 8)].tolist()
    return f"{shown}" if end - begin <= 8 else f"{shown[:-1]} and {end - begin - 7} more"


def _seal(packed: Array) -> None:
    packed[_CHECKED - 8 : _CHECKED].view("<i8")[0] = zlib.crc32(packed[_CHECKED:].data)


def _column_type(in_features: int) -> str:
    return "<u2" if in_features <= 65536 else "<i4"


def _bytes(packed: object) -> Array:
    if isinstance(packed, torch.Tensor) and packed.is_meta:
        raise TypeError(
            "Expected a packed Connectivity with values, got one on the meta device: "
            "take _extra_state from a state on the CPU"
        )
    if not isinstance(packed, torch.Tensor) or packed.dim() != 1:
        got = list(packed.shape) if isinstance(packed, torch.Tensor) else type(packed).__name__
        raise TypeError(f"Expected a packed Connectivity, a tensor of one dimension, got {got}")
    values = packed.detach().cpu()
    if values.dtype != torch.uint8:
        rounded = values.double().round()
        near = (values.double() - rounded).abs() < 0.1
        if not bool((near & (rounded >= 0) & (rounded <= 255)).all()):
            raise ValueError(f"Expected a packed Connectivity, got no bytes: {_CAUSE}")
        values = rounded.to(torch.uint8)
    array: Array = values.contiguous().numpy()
    return array


class _Reader:
    """Arrays, one after the other, of which none may be longer than what is there."""

    def __init__(self, data: Array) -> None:
        self.data = data

    def take(self, count: int, dtype: str) -> Array:
        size = count * np.dtype(dtype).itemsize
        if size > self.data.size:
            raise ValueError(f"Expected {size} more bytes of a Connectivity, got {self.data.size}")
        found, self.data = self.data[:size], self.data[size:]
        return np.frombuffer(found.tobytes(), dtype)  # at an address that fits the type

    def pointer(self, count: int, total: int, step: int) -> Array:
        """[count + 1] from 0 to total: told by a step > 0, or stored."""
        if step <= 0:
            return self.take(count + 1, "<i4")
        if step * count != total:
            raise ValueError(f"Expected {count} steps of {step} to end at {total}")
        return np.arange(0, total + 1, step)

    def end(self) -> None:
        if self.data.size:
            raise ValueError(f"Expected the end of a Connectivity, got {self.data.size} more bytes")
