"""The C++ backend: extension module _cpu, compiled per ISA, on torch's own thread pool."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from ..topology import Connectivity
from . import _order, _pool

STORES_LOW = True
ROUNDS_X = True

_SIGNS = torch.empty(0, dtype=torch.int32)  # asking it for more is faster than naming its dtype


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The extension and None, or None and the reason. A broken extension raises its own error."""
    try:
        from dendrite_kernels import _cpu  # type: ignore[attr-defined]
    except ImportError:
        if _is_built():
            raise
        return (
            None,
            (
                "the extension dendrite_kernels._cpu was not built;"
                " install a C++ compiler and reinstall"
            ),
        )
    _cpu.configure(
        torch.Tensor.__dlpack_c_exchange_api__,
        _pool.torch_parallel_for_address(),
        torch.Tensor,
        torch.nn.Parameter,
    )
    return _cpu, None


def _is_built() -> bool:
    folder = os.path.dirname(os.path.dirname(__file__))
    return any(name.startswith("_cpu.") for name in os.listdir(folder))


def _threads() -> int:
    return 1 if _pool.forked() else torch.get_num_threads()


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
    """For the gradients of weights alone."""
    return connectivity.cached(
        "cpp by centre", lambda: _bind_ordered(connectivity, _order.by_centre(connectivity))
    )


def _forward(connectivity: Connectivity) -> Any:
    """For forward with somas."""

    def bind() -> Any:
        topology = _by_centre(connectivity)
        if topology is not _topology(connectivity):
            return topology
        return _bind_ordered(connectivity, _order.by_length(connectivity))

    return connectivity.cached("cpp forward", bind)


def _forward_rows(connectivity: Connectivity) -> Any:
    """For forward without somas."""
    return connectivity.cached(
        "cpp forward rows",
        lambda: _bind_ordered(connectivity, _order.rows_by_centre(connectivity)),
    )


def accepts(
    x: torch.Tensor,
    weight: torch.Tensor,
    dendrite_bias: torch.Tensor | None,
    cable_weight: torch.Tensor | None,
    soma_bias: torch.Tensor | None,
    connectivity: Connectivity,
) -> bool:
    """Whether a forward call may pass these objects on just as they are; never raises."""
    topology = _topology(connectivity)
    accepted: bool = _load()[0].accepts(topology, x, weight, dendrite_bias, cable_weight, soma_bias)
    return accepted


def dendritic_output(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: torch.Tensor | None,
    cable_weight: torch.Tensor,
    soma_bias: torch.Tensor | None,
    connectivity: Connectivity,
    negative_slope: float,
    signs: torch.Tensor | None = None,
    round_x: bool = False,
) -> torch.Tensor:
    """y of `dendritic_forward`, which leaves its signs in `signs`, if given."""
    topology = _forward(connectivity)
    y = x.new_empty(x.shape[0], connectivity.num_somas)  # two numbers: parsed faster than a tuple
    _load()[0].forward(
        topology, x, synapse_weight, dendrite_bias, cable_weight, soma_bias, negative_slope,
        round_x, y, signs, _threads(),
    )  # fmt: skip
    return y


def dendritic_forward(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: torch.Tensor | None,
    cable_weight: torch.Tensor,
    soma_bias: torch.Tensor | None,
    connectivity: Connectivity,
    negative_slope: float,
    save_signs: bool,
    round_x: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    words = (x.shape[0] + 31) // 32 if save_signs else 0
    signs = _SIGNS.new_empty(words, connectivity.num_dendrites)
    y = dendritic_output(
        x, synapse_weight, dendrite_bias, cable_weight, soma_bias, connectivity, negative_slope,
        signs if save_signs else None, round_x,
    )  # fmt: skip
    return y, signs


def dendritic_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    signs: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: torch.Tensor | None,
    cable_weight: torch.Tensor,
    connectivity: Connectivity,
    negative_slope: float,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, inputs = x.shape
    like = synapse_weight  # of its dtype are the gradients of parameters
    new = like.new_empty if batch else like.new_zeros  # no sample, no kernel: they are zero
    rows = connectivity.num_dendrites
    dx = x.new_empty(batch if need_x else 0, inputs)
    dw, dbd, dc = new(connectivity.nnz), new(rows), new(rows)
    dbs = new(connectivity.num_somas)
    if batch:
        _load()[0].backward(
            (_transposed if need_x else _by_centre)(connectivity),
            grad, x, y, signs, synapse_weight, dendrite_bias, cable_weight, negative_slope,
            dx if need_x else None, dw, dbd, dc, dbs, _threads(),
        )  # fmt: skip
    return dx, dw, dbd, dc, dbs


def sparse_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    connectivity: Connectivity,
    round_x: bool = False,
) -> torch.Tensor:
    u = x.new_empty(x.shape[0], connectivity.num_dendrites)
    topology = _forward_rows(connectivity)
    _load()[0].forward(topology, x, weight, bias, None, None, 1.0, round_x, u, None, _threads())
    return u


def sparse_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    connectivity: Connectivity,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, inputs = x.shape
    new = weight.new_empty if batch else weight.new_zeros
    dx = x.new_empty(batch if need_x else 0, inputs)
    dw, db = new(connectivity.nnz), new(connectivity.num_dendrites)
    if batch:
        _load()[0].backward(
            (_transposed if need_x else _topology)(connectivity),
            grad, x, None, None, weight, None, None, 1.0,
            dx if need_x else None, dw, db, None, None, _threads(),
        )  # fmt: skip
    return dx, dw, db
