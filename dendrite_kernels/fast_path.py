"""The fast path from a function to the C++ kernels, for the calls that need nothing on the way.

Most calls of a small layer pass plain tensors that fit, and nothing observes them. C++ confirms
that in one call; then the checks that explain what is wrong, autocast and the dispatcher are
skipped: together they cost more than a small kernel. All other calls, and the first one of each
Connectivity, go through the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C import _is_any_autocast_enabled
from torch.autograd import forward_ad

from . import backends, operators
from .activations import check_slope
from .backends import cpp
from .backends.protocol import Maybe
from .structure import Connectivity


def topology_of(connectivity: Any, has_cable: bool) -> Any:
    """The C++ object that says whether it accepts the operands and runs them, or None.

    None if something observes the call, another backend is chosen, synapses are dense, or the
    object is not made yet. `connectivity` may be of any type.
    """
    if (
        operators.observed()
        or _is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or backends.chosen.get() not in (None, "cpp")
        or type(connectivity) is not Connectivity
        or connectivity.is_dense
    ):
        return None
    return connectivity.derived.get(cpp.FORWARD if has_cable else cpp.FORWARD_ROWS)


def operator(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: Maybe,
    soma_bias: Maybe,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    negative_slope: float,
    soma_slope: float,
    save_signs: bool,
    round_x: bool = False,
) -> operators.Two | None:
    """What the operator `forward` returns, or None where the fast path does not serve."""
    check_slope(negative_slope)
    check_slope(soma_slope)
    connectivity = operators.known_connectivity(crow_indices, col_indices, soma_ptr)
    topology = topology_of(connectivity, cable_weight is not None)
    tensors = x, synapse_weight, dendrite_bias, cable_weight, soma_bias
    if topology is None or round_x:
        return None
    if (cable_weight is None and soma_bias is not None) or topology.accepts(*tensors) is None:
        return None
    if save_signs and cable_weight is not None:
        y, signs = topology.forward(*tensors, negative_slope, soma_slope, True)
        return y, signs.flatten()
    y = topology.forward(*tensors, negative_slope, soma_slope, False)
    return y, cpp.empty_strided((0,), (1,), torch.int32)
