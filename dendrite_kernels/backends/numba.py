"""The Numba backend: the whole package on machines without a C++ compiler or a wheel.

Kernels are compiled for the host when first called and kept in Numba's cache. They run on torch's
own threads (`_pool.py`): no Numba threading layer is ever started and no thread setting changed.
Numba is a core dependency, not an extra: whoever cannot build the C++ kernels gets this backend,
and `pip install` must be all they need to do. Importing this file does not import Numba.

Every function takes torch tensors (CPU) or numpy arrays and returns the same kind; memory is
shared, never copied. Without torch autograd, say from numpy and scipy:

    from dendrite_kernels.backends import numba as kernels
    y, signs = kernels.forward(x, weight, dendrite_bias, cable, soma_bias, connectivity,
                               save_signs=True)
    dx, dweight, ddendrite_bias, dcable, dsoma_bias = kernels.backward(
        grad, x, y, signs, weight, dendrite_bias, cable, connectivity)
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch

from ..structure import Connectivity
from . import _pool

Array = TypeVar("Array", torch.Tensor, "np.ndarray[Any, Any]")

_OLDEST = (0, 61)
_DTYPES = {torch.float32, torch.float64, np.dtype(np.float32), np.dtype(np.float64)}
_SIGNS: dict[type, Any] = {torch.Tensor: torch.int32, np.ndarray: np.dtype(np.int32)}
_SIGN_BITS = 32  # samples per word of `signs`


# --- what is there ---

STORES_LOW = False
ROUNDS_X = False


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot serve, or None. Does not import Numba."""
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return "numba is not installed"
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"Expected numba >= {oldest}, got {version}"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    if sys.byteorder != "little":
        return "sign bits are laid out for little-endian machines"
    try:
        _pool.address("torch_parallel_for")
    except RuntimeError as error:
        return str(error)
    return None


def info() -> dict[str, Any]:
    """Vector width, threads, versions and the state of the cache. Imports Numba."""
    from . import _numba_entry, _numba_token

    return {
        "isa": _numba_token.isa(),
        "threads": 1 if _pool.forked() else torch.get_num_threads(),
        "numba": importlib.metadata.version("numba"),
        "llvmlite": importlib.metadata.version("llvmlite"),
        "cache": _numba_entry.cache_state(),
    }


@functools.cache
def _launcher() -> ModuleType:
    """What needs Numba, imported at the first call."""
    from . import _numba_launch

    return _numba_launch


# Keys of what serves calls at once (`_numba_direct.py`): forward for `fast_path.py`.
FORWARD, FORWARD_ROWS = "numba forward", "numba forward rows"
BACKWARD, BACKWARD_ROWS = "numba backward", "numba backward rows"


def _at_once(connectivity: Connectivity, key: str, *arguments: Any) -> Any:
    """The results, if native code takes the arguments as they are; else None."""
    direct = connectivity.derived.get(key)
    return None if direct is None else direct.launch(*arguments)


# --- the operations; every array is checked before an address is taken ---


def dendritic_forward(
    x: Array,
    synapse_weight: Array,
    dendrite_bias: Array | None,
    cable_weight: Array,
    soma_bias: Array | None,
    connectivity: Connectivity,
    negative_slope: float,
    save_signs: bool,
) -> tuple[Array, Array]:
    """Dendrites, their sums at the somas, leaky ReLU after both.

    x [B, N], synapse_weight [nnz], dendrite_bias [R], cable_weight [R], soma_bias [S], float32 or
    float64 -> y [B, S] and signs int32 [ceil(B / 32), R], or [0, R] unless save_signs. Bit i of
    signs[t, r] says whether dendrite r was above 0 for sample 32 t + i.
    """
    rows, somas = connectivity.num_dendrites, connectivity.num_somas
    batch = _checked_batch(x, connectivity)
    _check_slope(negative_slope)
    _check("x", x, x, (batch, connectivity.in_features))
    _check("synapse_weight", synapse_weight, x, (connectivity.nnz,))
    _check("dendrite_bias", dendrite_bias, x, (rows,))
    _check("cable_weight", cable_weight, x, (rows,))
    _check("soma_bias", soma_bias, x, (somas,))
    launch = _launcher()
    y = launch.empty(x, batch, connectivity.num_somas)
    signs = launch.empty_signs(x, -(-batch // _SIGN_BITS) if save_signs else 0, rows)
    launch.forward(
        connectivity, negative_slope, linear=False, x=x, y=y, signs=signs if save_signs else None,
        weight=synapse_weight, dendrite_bias=dendrite_bias, cable=cable_weight,
        soma_bias=soma_bias,
    )  # fmt: skip
    return y, signs


def dendritic_backward(
    grad: Array,
    x: Array,
    y: Array,
    signs: Array,
    synapse_weight: Array,
    dendrite_bias: Array | None,
    cable_weight: Array,
    connectivity: Connectivity,
    negative_slope: float,
    need_x: bool,
) -> tuple[Array, Array, Array, Array, Array]:
    """From grad [B, S] and what `dendritic_forward` took and returned: dx [B, N] ([0, N] unless
    need_x), and the gradients of synapse_weight, dendrite_bias, cable_weight and soma_bias.
    """
    at_once: tuple[Array, Array, Array, Array, Array] | None = _at_once(
        connectivity, BACKWARD, grad, x, y, signs, synapse_weight, dendrite_bias, cable_weight,
        negative_slope, need_x,
    )  # fmt: skip
    if at_once is not None:
        return at_once
    rows, somas = connectivity.num_dendrites, connectivity.num_somas
    batch = _checked_batch(x, connectivity)
    _check_slope(negative_slope)
    _check("x", x, x, (batch, connectivity.in_features))
    _check("grad", grad, x, (batch, somas))
    _check("y", y, x, (batch, somas))
    _check("signs", signs, x, (-(-batch // _SIGN_BITS), rows), signs=True)
    _check("synapse_weight", synapse_weight, x, (connectivity.nnz,))
    _check("dendrite_bias", dendrite_bias, x, (rows,))
    _check("cable_weight", cable_weight, x, (rows,))
    launch = _launcher()
    new = launch.empty if batch else launch.zeros  # no sample, no kernel: gradients are zero
    dx = launch.empty(x, batch if need_x else 0, x.shape[1])
    dw, d_soma = new(x, connectivity.nnz), new(x, connectivity.num_somas)
    d_dendrite, d_cable = new(x, rows), new(x, rows)
    if batch:
        launch.backward(
            connectivity, need_x, negative_slope, linear=False, grad=grad, x=x, y=y, signs=signs,
            weight=synapse_weight, dendrite_bias=dendrite_bias, cable=cable_weight, dx=dx, dw=dw,
            d_dendrite_bias=d_dendrite, d_cable=d_cable, d_soma_bias=d_soma,
        )  # fmt: skip
    return dx, dw, d_dendrite, d_cable, d_soma


def sparse_forward(
    x: Array, weight: Array, bias: Array | None, connectivity: Connectivity
) -> Array:
    """x [B, N], weight [nnz], bias [R] -> [B, R]; the somas of the connectivity do not matter."""
    rows, batch = connectivity.num_dendrites, _checked_batch(x, connectivity)
    _check("x", x, x, (batch, connectivity.in_features))
    _check("weight", weight, x, (connectivity.nnz,))
    _check("bias", bias, x, (rows,))
    launch = _launcher()
    y: Array = launch.empty(x, batch, rows)
    launch.forward(connectivity, linear=True, x=x, y=y, weight=weight, dendrite_bias=bias)
    return y


def sparse_backward(
    grad: Array, x: Array, weight: Array, connectivity: Connectivity, need_x: bool
) -> tuple[Array, Array, Array]:
    """From grad [B, R]: dx [B, N] ([0, N] unless need_x), dweight [nnz], dbias [R]."""
    at_once: tuple[Array, Array, Array] | None = _at_once(
        connectivity, BACKWARD_ROWS, grad, x, weight, 1.0, need_x
    )
    if at_once is not None:
        return at_once
    rows, batch = connectivity.num_dendrites, _checked_batch(x, connectivity)
    _check("x", x, x, (batch, connectivity.in_features))
    _check("grad", grad, x, (batch, rows))
    _check("weight", weight, x, (connectivity.nnz,))
    launch = _launcher()
    new = launch.empty if batch else launch.zeros
    dx = launch.empty(x, batch if need_x else 0, x.shape[1])
    dw, d_bias = new(x, connectivity.nnz), new(x, rows)
    if batch:
        launch.backward(
            connectivity, need_x, linear=True, grad=grad, x=x, weight=weight, dx=dx, dw=dw,
            d_dendrite_bias=d_bias,
        )  # fmt: skip
    return dx, dw, d_bias


# --- the dendritic operation under shorter names and with defaults, for direct use ---


def forward(
    x: Array,
    synapse_weight: Array,
    dendrite_bias: Array | None,
    cable_weight: Array,
    soma_bias: Array | None,
    connectivity: Connectivity,
    *,
    negative_slope: float = 0.1,
    save_signs: bool = False,
) -> tuple[Array, Array]:
    """`dendritic_forward` for numpy arrays or torch tensors of any origin: checks them first.

    Raises TypeError or ValueError for other kinds, dtypes, shapes or memory layouts than
    `dendritic_forward` says, RuntimeError where the backend is unavailable.
    """
    return dendritic_forward(
        x, synapse_weight, dendrite_bias, cable_weight, soma_bias, connectivity, negative_slope,
        save_signs,
    )  # fmt: skip


def backward(
    grad: Array,
    x: Array,
    y: Array,
    signs: Array,
    synapse_weight: Array,
    dendrite_bias: Array | None,
    cable_weight: Array,
    connectivity: Connectivity,
    *,
    negative_slope: float = 0.1,
    need_x: bool = True,
) -> tuple[Array, Array, Array, Array, Array]:
    """`dendritic_backward`, with the checks and errors of `forward`."""
    return dendritic_backward(
        grad, x, y, signs, synapse_weight, dendrite_bias, cable_weight, connectivity,
        negative_slope, need_x,
    )  # fmt: skip


def _checked_batch(x: Any, connectivity: Connectivity) -> int:
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"the Numba backend is unavailable: {reason}")
    if not isinstance(x, (torch.Tensor, np.ndarray)):
        raise TypeError(f"Expected x to be a torch tensor or numpy array, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"Expected x of dtype float32 or float64, got {_name(x.dtype)}")
    if x.ndim != 2:
        raise ValueError(
            f"Expected x of shape [B, {connectivity.in_features}], got {list(x.shape)}"
        )
    return int(x.shape[0])


def _check_slope(negative_slope: float) -> None:
    if not negative_slope >= 0:
        raise ValueError(f"Expected negative_slope >= 0, got {negative_slope}")


def _check(
    name: str, array: Any, like: Any, shape: tuple[int, ...], *, signs: bool = False
) -> None:
    """That `array` is of x's kind and, unless it is sign words, of x's dtype."""
    if array is None and name.endswith("bias"):
        return
    kind = torch.Tensor if isinstance(like, torch.Tensor) else np.ndarray
    if not isinstance(array, kind):
        raise TypeError(f"Expected {name} to be a {kind.__name__}, got {type(array).__name__}")
    dtype = _SIGNS[kind] if signs else like.dtype
    if array.dtype != dtype:
        raise TypeError(f"Expected {name} of dtype {_name(dtype)}, got {_name(array.dtype)}")
    if array.shape != shape:
        raise ValueError(f"Expected {name} of shape {list(shape)}, got {list(array.shape)}")
    if isinstance(array, torch.Tensor):
        if not array.is_cpu or array.layout != torch.strided:
            raise TypeError(
                f"Expected {name} to be a dense CPU tensor, got {array.layout} on {array.device}"
            )
        if array.is_neg():
            raise ValueError(f"Expected {name} to hold its signs, got a lazily negated tensor")
        contiguous = array.is_contiguous()
    else:
        contiguous = array.flags.c_contiguous
    if not contiguous:
        raise ValueError(f"Expected {name} to be contiguous in row-major order, got other strides")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
