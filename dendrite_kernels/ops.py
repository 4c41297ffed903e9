"""The operators: schemas, fake kernels and dispatch to a backend, all in one place.

Connectivity crosses the dispatcher as its three index tensors, so that torch.compile and
torch.export see plain tensors; the `Connectivity` they come from hangs on the column tensor.
"""

from __future__ import annotations

import weakref

import torch

from .backends import select
from .topology import Connectivity

Maybe = torch.Tensor | None
_INDICES = "Tensor crow_indices, Tensor col_indices, Tensor soma_ptr"

_library = torch.library.Library("dendrite_kernels", "DEF")
_library.define(
    "dendritic_forward(Tensor x, Tensor synapse_weight, Tensor? dendrite_bias, Tensor cable_weight,"
    f" Tensor? soma_bias, {_INDICES}, float negative_slope, bool save_signs) -> (Tensor, Tensor)"
)
_library.define(
    "dendritic_backward(Tensor grad, Tensor x, Tensor y, Tensor signs, Tensor synapse_weight,"
    f" Tensor? dendrite_bias, Tensor cable_weight, {_INDICES}, float negative_slope, bool need_x)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"sparse_forward(Tensor x, Tensor weight, Tensor? bias, {_INDICES}) -> Tensor")
_library.define(
    f"sparse_backward(Tensor grad, Tensor x, Tensor weight, {_INDICES}, bool need_x)"
    " -> (Tensor, Tensor, Tensor)"
)

_OWNER = "_dendrite_kernels_connectivity"


def index_tensors(connectivity: Connectivity) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operators' index arguments, marked so that they lead back to `connectivity`."""
    col = connectivity.col_indices
    if not hasattr(col, _OWNER):
        setattr(col, _OWNER, weakref.ref(connectivity))
    return connectivity.crow_indices, col, connectivity.soma_ptr


def _connectivity(
    crow: torch.Tensor, col: torch.Tensor, soma_ptr: torch.Tensor, x: torch.Tensor
) -> Connectivity:
    """The Connectivity behind index tensors; unknown ones are validated and remembered."""
    owner = getattr(col, _OWNER, None)
    found: Connectivity | None = owner() if owner is not None else None
    if found is None:
        found = Connectivity.from_csr(crow, col, x.shape[1], soma_ptr)
        setattr(col, _OWNER, lambda: found)
    return found


def _dendritic_forward(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    negative_slope: float,
    save_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return select(x.device).dendritic_forward(
        x.contiguous(),
        synapse_weight.contiguous(),
        None if dendrite_bias is None else dendrite_bias.contiguous(),
        cable_weight.contiguous(),
        None if soma_bias is None else soma_bias.contiguous(),
        _connectivity(crow_indices, col_indices, soma_ptr, x),
        negative_slope,
        save_signs,
    )


def _dendritic_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    signs: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    negative_slope: float,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return select(x.device).dendritic_backward(
        grad.contiguous(),
        x.contiguous(),
        y.contiguous(),
        signs.contiguous(),
        synapse_weight.contiguous(),
        None if dendrite_bias is None else dendrite_bias.contiguous(),
        cable_weight.contiguous(),
        _connectivity(crow_indices, col_indices, soma_ptr, x),
        negative_slope,
        need_x,
    )


def _sparse_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
) -> torch.Tensor:
    return select(x.device).sparse_forward(
        x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        _connectivity(crow_indices, col_indices, soma_ptr, x),
    )


def _sparse_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return select(x.device).sparse_backward(
        grad.contiguous(),
        x.contiguous(),
        weight.contiguous(),
        _connectivity(crow_indices, col_indices, soma_ptr, x),
        need_x,
    )


_KERNELS = {
    "dendritic_forward": _dendritic_forward,
    "dendritic_backward": _dendritic_backward,
    "sparse_forward": _sparse_forward,
    "sparse_backward": _sparse_backward,
}
for _name, _kernel in _KERNELS.items():
    # One kernel for every device: the backend is chosen by the device of x.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")

dendritic_forward = torch.ops.dendrite_kernels.dendritic_forward.default
dendritic_backward = torch.ops.dendrite_kernels.dendritic_backward.default
sparse_forward = torch.ops.dendrite_kernels.sparse_forward.default
sparse_backward = torch.ops.dendrite_kernels.sparse_backward.default


# ---- the shapes that the operators return: for torch.compile, export and meta tensors ----


@torch.library.register_fake("dendrite_kernels::dendritic_forward", lib=_library)
def _fake_dendritic_forward(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    negative_slope: float,
    save_signs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    words = (x.shape[0] + 31) // 32 if save_signs else 0
    signs = x.new_empty((words, cable_weight.shape[0]), dtype=torch.int32)
    return x.new_empty((x.shape[0], soma_ptr.shape[0] - 1)), signs


@torch.library.register_fake("dendrite_kernels::dendritic_backward", lib=_library)
def _fake_dendritic_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    signs: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    negative_slope: float,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = x.new_empty((x.shape[0] if need_x else 0, x.shape[1]))
    rows, somas = cable_weight.shape[0], soma_ptr.shape[0] - 1
    dw = x.new_empty(synapse_weight.shape)
    return dx, dw, x.new_empty(rows), x.new_empty(rows), x.new_empty(somas)


@torch.library.register_fake("dendrite_kernels::sparse_forward", lib=_library)
def _fake_sparse_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], crow_indices.shape[0] - 1))


@torch.library.register_fake("dendrite_kernels::sparse_backward", lib=_library)
def _fake_sparse_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = x.new_empty((x.shape[0] if need_x else 0, x.shape[1]))
    return dx, x.new_empty(weight.shape), x.new_empty(crow_indices.shape[0] - 1)
