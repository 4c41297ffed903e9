"""What training a layer takes, part by part, without training it.

Sizes of arrays are exact. The allocator's share is a rule of thumb, held to measurements in
tests/nn/test_estimate.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch

from ._validate import check_size
from .backends import _order, select
from .functional import check_dtype
from .structure import Connectivity
from .transposed import choose_block_rows

OptimizerName = Literal["adam", "adamw", "sgd"]
EstimatedBackend = Literal["cpp", "numba", "reference"]

_BACKENDS = get_args(EstimatedBackend)
_STATES = {"adam": 2, "adamw": 2, "sgd": 0}  # numbers that it keeps for each parameter
_MIB = 1 << 20
_OWN_BYTES = _MIB // 2  # of x, up to which each thread has its own copy (csrc/cpu/samples.h)
_TILE = 128  # samples that kernels go through together
_BLOCK = 128  # dendrites that they do so for
_MAPPED = 32 * _MIB  # larger arrays go back to the system at once (glibc's mmap threshold)
_KEPT = 0.6  # of smaller ones that a step frees, what the next does not use: measured
_OBJECTS = _MIB  # of Python and autograd; code that runs for the first time


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a layer and its training on the CPU add to a process; see `estimate_memory`."""

    parameters: int  # synapse and cable weights, biases
    gradients: int  # as many
    optimizer: int  # Adam: two moments, as many each
    index: int  # of the Connectivity: int32 columns and pointers
    plan: int  # what backends derive: narrow columns, an order; for the gradient of x the transpose
    activations: int  # sign bits, outputs and their gradient; the gradient of x
    workspace: int  # what kernels keep between calls: transposed samples, sums
    allocator: int  # freed and not reused: what the loss took, some of the step before
    dense: int  # what the same layer takes in all as dense matrices under masks

    @property
    def total(self) -> int:
        """All parts together, without `dense`."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "dense")

    def __str__(self) -> str:
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)]
        rows.insert(-1, ("total", self.total))
        return "\n".join(f"{name:12}{bytes_ / _MIB:12,.1f} MiB" for name, bytes_ in rows)


@dataclass(frozen=True)
class _Layer:
    """Sizes, with the names of the equations."""

    batch: int
    inputs: int
    rows: int
    somas: int
    synapses: int
    threads: int
    item: int  # bytes of a number
    sums_apart: bool  # those of a large batch do not grow where the gradient will be
    order: int  # bytes of the order in which dendrites are visited


def estimate_memory(
    connectivity: Connectivity,
    batch: int,
    optimizer: OptimizerName = "adam",
    *,
    dtype: torch.dtype | None = None,
    backend: EstimatedBackend | None = None,
    input_gradient: bool = False,
) -> MemoryEstimate:
    """Bytes that making and training a DendriticLayer adds to a process, without doing it.

    Counts a layer with biases and a piecewise linear activation, on the CPU with the number of
    threads that torch has now, at the peak of a step: zero_grad, forward, cross-entropy or a loss
    like it, backward, optimizer. Not the input, nor torch and other code, nor what drawing the
    connectivity takes for a moment. `dense` is the article's way, trained by the same optimizer:
    two matrices under int64 masks.

    Args:
        connectivity: of the layer. That of a DendriticTree tells what its flat layer takes, without
            the nodes above its dendrites (docs/trees.md).
        batch: samples of a step.
        optimizer: "adam", "adamw" or "sgd" (without momentum).
        dtype: of parameters and samples; torch's default dtype if None.
        backend: "cpp", "numba" or "reference"; None: the best one available.
        input_gradient: whether x needs a gradient, as in every layer of a network but the first:
            adds that, the transposed plan and two sums for each synapse.

    Raises:
        TypeError, ValueError: an argument is not one of those.
    """
    if not isinstance(connectivity, Connectivity):
        raise TypeError(f"Expected a Connectivity, got {type(connectivity).__name__}")
    if optimizer not in _STATES:
        raise ValueError(f"Expected an optimizer of {list(_STATES)}, got {optimizer!r}")
    backend = backend or _best_backend()
    if backend not in _BACKENDS:
        raise ValueError(f"Expected a backend of {list(_BACKENDS)}, got {backend!r}")
    dtype = dtype or torch.get_default_dtype()
    check_dtype("parameters", dtype)
    layer = _sizes(connectivity, check_size("batch", batch), dtype, backend)
    weights = [layer.synapses * layer.item] + [layer.rows * layer.item] * 2
    parameters = sum(weights) + layer.somas * layer.item
    if connectivity.is_dense or backend == "reference":
        copies = 0 if connectivity.is_dense else 2
        plan, activations, workspace = _as_matrices(layer, copies)
    else:
        plan, activations = _plan(layer, input_gradient), _sign_bits(layer)
        workspace = _in_pages(_workspace(layer, backend, input_gradient))
    if layer.item < 4:
        workspace += 2 * parameters * 4 // layer.item  # weights and gradients in float32
    outputs = [layer.batch * layer.somas * layer.item] * 2  # y and its gradient
    loss = outputs  # log-probabilities and their gradient, gone when the kernels run
    if input_gradient:
        activations.append(layer.batch * layer.inputs * layer.item)
    return MemoryEstimate(
        parameters=parameters,
        gradients=parameters,
        optimizer=_STATES[optimizer] * parameters,
        index=4 * (layer.synapses + layer.rows + layer.somas + 2),
        plan=plan,
        activations=sum(activations) + sum(outputs),
        workspace=workspace,
        allocator=_allocator([*weights, *activations, *outputs, *loss]) + _small(loss),
        dense=_dense(layer, _STATES[optimizer]),
    )


def _best_backend() -> EstimatedBackend:
    chosen: Any = select(torch.device("cpu"))
    name: EstimatedBackend = chosen.__name__.rpartition(".")[2]
    return name


def _sizes(c: Connectivity, batch: int, dtype: torch.dtype, backend: str) -> _Layer:
    order = _order.by_centre(c) if backend == "cpp" else None
    return _Layer(
        batch=batch,
        inputs=c.in_features,
        rows=c.num_dendrites,
        somas=c.num_somas,
        synapses=c.nnz,
        threads=torch.get_num_threads(),
        item=dtype.itemsize,
        sums_apart=c.fan_in is None or c.fan_in % 16 != 0 or order is not None,
        order=sum(part.nbytes for part in order or () if isinstance(part, np.ndarray)),
    )


def _sign_bits(layer: _Layer) -> list[int]:
    return [4 * -(-layer.batch // 32) * layer.rows]


def _plan(layer: _Layer, input_gradient: bool) -> int:
    """Columns as uint16 where they fit, an order; for dx, about 1.1 slots a synapse, with pads."""
    columns = 2 * layer.synapses if layer.inputs <= 1 << 16 else 0
    if not input_gradient:
        return columns + layer.order
    block = choose_block_rows(layer.rows, layer.inputs, layer.synapses, layer.threads)
    narrow = 1.125 * block * layer.synapses / layer.rows < 1 << 16  # slots of a block
    place = 2 if narrow else 4  # where a synapse's slot is, and which synapse a slot's; uint16 rows
    return columns + layer.order + int(layer.synapses * (2.1 * place + 2.4))


def _workspace(layer: _Layer, backend: str, input_gradient: bool) -> int:
    """Samples and gradients at the somas, transposed; sums that go into gradients."""
    batch = -(-layer.batch // 32) * 32
    x, y = batch * layer.inputs, batch * layer.somas
    tile = min(batch, _TILE) * (layer.inputs + layer.somas)
    slots = int(1.1 * layer.synapses)
    few_tiles = layer.batch < 4 * _TILE * layer.threads
    if backend == "cpp" and x > 4 * layer.synapses and not few_tiles:
        numbers = layer.threads * (tile + slots + layer.rows)  # all is private to a thread
        return layer.item * (numbers + input_gradient * (slots + layer.threads * tile))
    own = layer.threads if x * layer.item <= _OWN_BYTES else 1
    numbers = own * x + y + layer.rows + layer.threads * _BLOCK * _TILE
    if input_gradient:
        numbers += layer.threads * x + 2 * slots
    elif backend == "cpp" and layer.sums_apart and x * layer.item > _MIB:
        numbers += slots + 8 * layer.rows
    return layer.item * numbers


def _in_pages(bytes_: int) -> int:
    """Workspaces of 1 MiB and more are made of huge pages."""
    return bytes_ if bytes_ < _MIB else -(-bytes_ // (2 * _MIB)) * 2 * _MIB


def _as_matrices(layer: _Layer, copies: int) -> tuple[int, list[int], int]:
    """No plan; u, a and their gradients; `copies` of the weights as matrices."""
    entries = layer.rows * (layer.inputs + layer.somas)
    return 0, [layer.batch * layer.rows * layer.item] * 4, copies * entries * layer.item


def _allocator(freed: Iterable[int]) -> int:
    return _OBJECTS + int(_KEPT * _small(freed))


def _small(arrays: Iterable[int]) -> int:
    """Bytes of those that the allocator keeps when they are freed."""
    return sum(bytes_ for bytes_ in arrays if bytes_ < _MAPPED)


def _dense(layer: _Layer, states: int) -> int:
    matrices = [layer.rows * layer.inputs, layer.somas * layer.rows]
    kept = sum(matrices) * ((2 + states) * layer.item + 8)
    activations = [layer.batch * layer.rows * layer.item] * 4
    activations += [layer.batch * layer.somas * layer.item] * 4
    # Activations are gone when a mask is converted to be multiplied with.
    peak = max(sum(activations), matrices[0] * layer.item)
    freed = [*activations, *(entries * layer.item for entries in matrices)]
    return kept + peak + _allocator(freed)
