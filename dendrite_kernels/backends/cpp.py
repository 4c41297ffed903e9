"""The C++ backend: extension module _cpu, compiled for several ISAs, on the threads of torch."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from ..structure import Connectivity
from . import _extension, _order, _pool
from .protocol import Gradients, Maybe, Operands

STORES_LOW = True
ROUNDS_X = True
STEPS = False

FORWARD, FORWARD_ROWS = "cpp forward", "cpp forward rows"  # cache keys that the fast path looks up

# The allocator of compiled programs. It parses fewer arguments: half the time of torch.empty.
empty_strided = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]


@functools.cache
def _load() -> tuple[Any, str | None]:
    """(extension, None), or (None, reason) if it was not built. A broken one raises its error."""
    built = _extension.is_built("_cpu")
    try:
        from dendrite_kernels import _cpu  # type: ignore[attr-defined]
    except ImportError:
        if built:
            raise
        return None, f"the extension dendrite_kernels._cpu {_why_absent()}"
    settings = (
        torch.Tensor.__dlpack_c_exchange_api__,
        _pool.address("torch_parallel_for"),
        _pool.address("torch_get_num_threads"),
        _pool.forked_address(),
        torch,
        empty_strided,
    )
    try:
        _cpu.configure(*settings)
    except (AttributeError, TypeError) as error:
        raise ImportError(
            f"Expected {_cpu.__file__} to be built from the sources of this version, got one of "
            "others: install the package again, in a checkout by pip install -e ."
        ) from error
    return _cpu, None


def _why_absent() -> str:
    checkout = os.path.dirname(_extension.PACKAGE)
    if os.path.exists(os.path.join(checkout, "setup.py")):
        return (
            f"is not in {_extension.PACKAGE}, which Python found before any installed package: "
            f"work in another folder than {checkout}, or pip install -e . there, with a C++ "
            "compiler"
        )
    return (
        "was not built: reinstall with DENDRITE_KERNELS_REQUIRE=cpu in the environment, which "
        "builds it or shows why it cannot (a C++ compiler: GCC 12, Clang 15 or newer?)"
    )


def _threads() -> int:
    threads: int = _load()[0].threads()
    return threads


def unavailable() -> str | None:
    return _load()[1]


def info() -> dict[str, Any]:
    extension = _load()[0]
    return {
        "isa": extension.isa(),
        "supported_isas": extension.supported_isas(),
        "threads": _threads(),
    }


def _bind(connectivity: Connectivity) -> Any:
    return _load()[0].Topology(
        connectivity.in_features,
        connectivity.crow_indices.numpy(),
        connectivity.columns,
        connectivity.soma_ptr.numpy(),
        connectivity.fan_in or 0,
    )


def _bind_transposed(connectivity: Connectivity) -> Any:
    topology, plan = _bind(connectivity), connectivity.transposed
    topology.set_transposed(
        plan.block_rows,
        plan.group,
        plan.column_ptr,
        plan.column,
        plan.groups,
        plan.slot_ptr,
        plan.row,
        plan.slot,
        plan.synapse,
    )
    return topology


def _bind_ordered(connectivity: Connectivity, order: _order.Order | None) -> Any:
    if order is None:
        return _topology(connectivity)
    topology = _bind(connectivity)
    topology.set_order(*order)
    return topology


def _topology(connectivity: Connectivity) -> Any:
    """For backward without somas that needs no gradient of x."""
    return connectivity.cached("cpp", lambda: _bind(connectivity))


def _transposed(connectivity: Connectivity) -> Any:
    """For the gradient of x."""
    return connectivity.cached("cpp transposed", lambda: _bind_transposed(connectivity))


def _by_centre(connectivity: Connectivity) -> Any:
    """For forward with somas, and for the gradients of weights alone."""
    return connectivity.cached(
        FORWARD, lambda: _bind_ordered(connectivity, _order.by_centre(connectivity))
    )


def _forward_rows(connectivity: Connectivity) -> Any:
    """For forward without somas."""
    return connectivity.cached(
        FORWARD_ROWS,
        lambda: _bind_ordered(connectivity, _order.rows_by_centre(connectivity)),
    )


def forward(
    x: torch.Tensor, operands: Operands, save_signs: bool, round_x: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, dendrite_bias, cable, soma_bias, connectivity, slope, soma_slope = operands
    batch, rows = x.shape[0], connectivity.num_dendrites
    # sizes as two numbers are parsed faster than as a tuple
    y = x.new_empty(batch, rows if cable is None else connectivity.num_somas)
    signs = x.new_empty((batch + 31) // 32 if save_signs else 0, rows, dtype=torch.int32)
    _load()[0].forward(
        (_forward_rows if cable is None else _by_centre)(connectivity), x, weight, dendrite_bias,
        cable, soma_bias, slope, soma_slope, round_x, y, signs if save_signs else None, _threads(),
    )  # fmt: skip
    return y, signs


def backward(
    grad: torch.Tensor, x: torch.Tensor, y: Maybe, signs: Maybe, operands: Operands, need_x: bool
) -> Gradients:
    weight, dendrite_bias, cable, _, connectivity, slope, soma_slope = operands
    batch, inputs = x.shape
    new = weight.new_empty if batch else weight.new_zeros  # without samples no kernel runs
    dx = x.new_empty(batch if need_x else 0, inputs)
    dw, dbd = new(connectivity.nnz), new(connectivity.num_dendrites)
    if cable is None:
        dc, dbs = (empty_strided((0,), (1,), weight.dtype) for _ in range(2))
    else:
        dc, dbs = new(connectivity.num_dendrites), new(connectivity.num_somas)
    if batch:
        of_weights = _topology if cable is None else _by_centre
        _load()[0].backward(
            (_transposed if need_x else of_weights)(connectivity),
            grad, x, y, signs, weight, dendrite_bias, cable, slope, soma_slope,
            dx if need_x else None, dw, dbd, dc, dbs, _threads(),
        )  # fmt: skip
    return dx, dw, dbd, dc, dbs
