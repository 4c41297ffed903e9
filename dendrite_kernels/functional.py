"""The operations as functions: what they accept, and which path computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, SupportsIndex, get_args

import torch
import torch.nn.functional as F

from . import _gated, activations, autograd, operators, transforms
from ._validate import check_size
from .activations import ActivationName
from .backends.protocol import Maybe
from .structure import Connectivity

Precision = Literal["bf16"]
Reduce = Literal["sum", "max", "absmax"]

_EXACT = (torch.float32, torch.float64)  # what kernels compute in
_LOW = operators.LOW
_STRIDED = torch.strided
_NO_SLOPES = (1.0, 1.0)
_TRACERS = (
    "torch.fx.symbolic_trace takes dendrite_kernels.interop.portable(model); torch.export and "
    "torch.jit.trace take the model as it is"
)
_NAMES = ("synapse_weight", "dendrite_bias", "cable_weight", "soma_bias")


def check_activation(activation: str, negative_slope: float) -> None:
    """Error unless the name is known and the slope is a number, finite and not negative."""
    activations.slopes_of(activation, None, negative_slope)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """TypeError unless the operations take tensors of this dtype."""
    if dtype not in _EXACT and dtype not in _LOW:
        expected = "float32, float64, bfloat16 or float16"
        raise TypeError(f"Expected {name} of dtype {expected}, got {dtype}")


def check_precision(precision: str | None) -> None:
    """ValueError unless the precision has a name."""
    if precision not in (None, "bf16"):
        raise ValueError(f"Expected precision None or 'bf16', got {precision!r}")


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast makes of x, None where it leaves x alone."""
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64:
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _fits(
    x: torch.Tensor, features: int, parameters: tuple[Maybe, ...], lengths: tuple[int, ...]
) -> bool:
    """Whether all is as a kernel wants it: the common case, told quickly."""
    try:
        dtype, device = x.dtype, x.device
        is_bias = False  # weights and their biases take turns; only biases may be None
        for tensor, length in zip(parameters, lengths, strict=True):
            if tensor is None:
                if not is_bias:
                    return False
            elif tensor.dtype is not dtype or tensor.shape != (length,) or tensor.device != device:
                return False
            if tensor is not None and tensor.layout is not _STRIDED:
                return False
            is_bias = not is_bias
        return (
            dtype in _EXACT
            and x.shape[-1:] == (features,)
            and not torch._C._is_any_autocast_enabled()
        )
    except AttributeError:  # not a tensor
        return False


def _check(
    x: torch.Tensor,
    connectivity: Connectivity,
    names: Sequence[str],
    parameters: tuple[Maybe, ...],
    lengths: tuple[int, ...],
) -> torch.dtype | None:
    """The low precision that the output has, or None.

    Everything must fit before a kernel runs.
    """
    if _fits(x, connectivity.in_features, parameters, lengths):
        return None
    if x.dim() == 0 or x.shape[-1] != connectivity.in_features:
        raise ValueError(
            f"Expected x of shape [..., {connectivity.in_features}], got {list(x.shape)}"
        )
    dtype, device = x.dtype, x.device
    check_dtype("x", dtype)
    autocast = _autocast_dtype(x)
    for name, given, length in zip(names, parameters, lengths, strict=True):
        if given is None and name.endswith("bias"):
            continue
        tensor = _require_tensor(name, given)
        if tensor.dim() != 1 or tensor.shape[0] != length:
            raise ValueError(f"Expected {name} of shape [{length}], got {list(tensor.shape)}")
        if tensor.dtype != dtype and (autocast is None or tensor.dtype == torch.float64):
            raise TypeError(f"Expected {name} of dtype {dtype} like x, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"Expected {name} on {device} like x, got {tensor.device}")
    return dtype if autocast is None and dtype in _LOW else autocast


def _in_float32(
    function: Callable[..., torch.Tensor], dtype: torch.dtype, *tensors: Maybe
) -> torch.Tensor:
    """`function` of the tensors, computed in float32 and rounded once to `dtype`."""
    first = tensors[0]
    assert first is not None
    with torch.autocast(first.device.type, enabled=False):
        return function(*(None if t is None else t.float() for t in tensors)).to(dtype)


def _require_tensor(name: str, tensor: Any) -> torch.Tensor:
    """The tensor; TypeError unless it is a dense one."""
    if not isinstance(tensor, torch.Tensor):
        remedy = f": {_TRACERS}" if isinstance(tensor, torch.fx.Proxy) else ""
        raise TypeError(
            f"Expected {name} to be a torch.Tensor, got {type(tensor).__name__}{remedy}"
        )
    if tensor.is_nested or tensor.layout is not _STRIDED:
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"Expected {name} to be a dense tensor, got {got}")
    return tensor


def _check_gate(given: Any, x: Any, c: Connectivity) -> torch.Tensor:
    """The gate; an error unless it is a tensor [R], or [..., R] that broadcasts to the samples."""
    gate, x = _require_tensor("gate", given), _rows_of(x, c)
    if gate.dtype != x.dtype and (_autocast_dtype(x) is None or gate.dtype == torch.float64):
        raise TypeError(f"Expected gate of dtype {x.dtype} like x, got {gate.dtype}")
    if gate.device != x.device:
        raise ValueError(f"Expected gate on {x.device} like x, got {gate.device}")
    samples, ours = x.shape[:-1], gate.shape[:-1]
    fits = gate.dim() and gate.shape[-1] == c.num_dendrites and len(ours) <= len(samples)
    pairs = zip(reversed(ours), reversed(samples), strict=False)
    if not fits or any(size not in (1, wanted) for size, wanted in pairs):
        expected = f"[{c.num_dendrites}] or {[*samples, c.num_dendrites]}"
        raise ValueError(f"Expected gate of shape {expected}, got {list(gate.shape)}")
    return gate


def _rows_of(x: Any, c: Connectivity) -> torch.Tensor:
    """What the slow path starts with: x as a dense tensor [..., N], images flattened."""
    if not isinstance(c, Connectivity):
        raise TypeError(f"Expected a Connectivity, got {type(c).__name__}")
    return _without_image(_require_tensor("x", x), c)


def _without_image(x: torch.Tensor, c: Connectivity) -> torch.Tensor:
    """x [..., N] where x are images [..., *in_shape], or [B, 1, H, W] for an in_shape (H, W).

    Any other x comes back as it is.

    Raises:
        ValueError: channels are first where the connectivity has them last, or the reverse.
    """
    shape = c.in_shape
    if shape is None or x.shape[-1:] == (c.in_features,):
        return x
    sizes = tuple(x.shape[-len(shape) :])
    if sizes == shape:
        one_channel = len(shape) == 2 and x.dim() == 4 and x.shape[1] == 1
        return x.flatten(1 if one_channel else -len(shape))
    other = (*shape[1:], shape[0]) if c.channels_first else (shape[-1], *shape[:-1])
    if len(shape) == 3 and sizes == other:
        where = ("first", "last") if c.channels_first else ("last", "first")
        raise ValueError(
            f"Expected images {list(shape)}, channels {where[0]}, got {list(sizes)}, channels "
            f"{where[1]}: draw the connectivity with channels_first={not c.channels_first}"
        )
    return x


def _flatten(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unflatten(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _takes_low(x: torch.Tensor) -> bool:
    """Whether the operators take x in its low precision; transforms differentiate in float32."""
    return x.dtype in _LOW and not transforms.active()


def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    connectivity: Connectivity,
    *,
    precision: Precision | None = None,
) -> torch.Tensor:
    """u = x W^T + bias with W [R, N] sparse: only the synapses that exist are computed.

    Args:
        x: [..., N] or images (see DendriticLayer), any strides; float64, float32, or bfloat16 and
            float16, whose sums are float32 and are rounded once, as under autocast.
        weight: [nnz], in the order of connectivity.col_indices.
        bias: [R] or None.
        connectivity: which inputs each of the R rows sees; its somas play no part.
        precision: see dendritic_layer.

    Returns:
        [..., R].

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit.
    """
    if precision is None:
        u = autograd.fast_layer(x, weight, bias, None, None, connectivity, _NO_SLOPES)
        if u is not None:
            return u
    x = _rows_of(x, connectivity)
    lengths = connectivity.nnz, connectivity.num_dendrites
    low = _check(x, connectivity, ("weight", "bias"), (weight, bias), lengths)
    round_x = precision is not None and _rounds(x, precision)
    if connectivity.is_dense:  # dense synapses are a matrix product
        x = transforms.round_to_bfloat16(x) if round_x else x
        return F.linear(
            x, weight.reshape(connectivity.num_dendrites, connectivity.in_features), bias
        )
    if low is not None and not _takes_low(x):
        wide = partial(sparse_linear, connectivity=connectivity, precision=precision)
        return _in_float32(wide, low, x, weight, bias)
    u = autograd.layer(_flatten(x), weight, bias, None, None, connectivity, _NO_SLOPES, round_x)
    return _unflatten(u if low is None else u.to(low), x)


def _rounds(x: torch.Tensor, precision: str) -> bool:
    """Whether x must be rounded to bfloat16."""
    check_precision(precision)
    if x.dtype == torch.float64:
        raise ValueError(f"Expected precision None for x of dtype {x.dtype}, got {precision!r}")
    return x.dtype != torch.bfloat16


def dendritic_layer(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    connectivity: Connectivity,
    *,
    activation: ActivationName = "leaky_relu",
    negative_slope: float = 0.1,
    soma_activation: ActivationName | None = None,
    precision: Precision | None = None,
    gate: Maybe = None,
) -> torch.Tensor:
    """A dendrosomatic layer: synapses -> dendrites -> cable -> somas.

        u[r] = sum_k synapse_weight[r, k] x[col[r, k]] + dendrite_bias[r];   a = phi(u)
        v[s] = sum_{r in soma s} cable_weight[r] a[r] + soma_bias[s];        y = psi(v)

    leaky_relu, relu and identity run as one fused kernel whose backward keeps a sign bit per
    dendrite and sample; other activations keep u; dense synapses are a matrix product. relu is
    leaky_relu of slope 0: a sum of -inf gives NaN, 0 times inf, where torch.relu gives 0.

    Args:
        x: [..., N] or images (see DendriticLayer), any strides; float64, float32, or bfloat16 and
            float16, whose sums are float32 and are rounded once, as under autocast.
        synapse_weight: [nnz], in the order of connectivity.col_indices.
        dendrite_bias: [R] or None.
        cable_weight: [R].
        soma_bias: [S] or None.
        connectivity: which inputs each dendrite sees, which dendrites each soma owns.
        activation: phi: leaky_relu, relu, identity, tanh, sigmoid, gelu, silu or elu.
        soma_activation: psi, by the same names; None: that of the dendrites. "identity" gives v.
        negative_slope: of leaky_relu, >= 0 (the derivative at 0 is the slope, as in PyTorch).
        precision: "bf16" lets forward round x to bfloat16, which may be faster where x is large:
            each input is off by at most 2**-8 of itself, so that u is off by at most 2**-8 times
            the sum of |w x|; nothing changes for integers up to 256, such as pixels. Weights, sums
            and the backward pass stay as they are. Not for float64.
        gate: factors of the dendrites after their activation, a[r] -> gate[r] a[r]: [R], the same
            for all samples, or [..., R], whose leading dimensions broadcast to those of x. The
            latter in low precision are computed in float32, and products with the cable of the
            former are rounded; see docs/gates.md.

    Returns:
        [..., S].

    Raises:
        TypeError, ValueError: a dtype, shape, device or option does not fit.

    Source: Chavlis & Poirazi (2025); docs/equations.md, sections 1 to 3.
    """
    slopes = activations.slopes_of(activation, soma_activation, negative_slope)
    c = connectivity
    if gate is not None:
        gate = _check_gate(gate, x, c)
        _check(_rows_of(x, c), c, _NAMES[2:3], (cable_weight,), (c.num_dendrites,))
        if gate.dim() == 1:  # the same for all samples: a part of the cable
            cable_weight, gate = cable_weight * gate, None
    if slopes is not None and precision is None and cable_weight is not None and gate is None:
        y = autograd.fast_layer(
            x, synapse_weight, dendrite_bias, cable_weight, soma_bias, c, slopes
        )
        if y is not None:
            return y
    x = _rows_of(x, c)
    tensors = synapse_weight, dendrite_bias, cable_weight, soma_bias
    lengths = c.nnz, c.num_dendrites, c.num_dendrites, c.num_somas
    low = _check(x, c, _NAMES, tensors, lengths)
    round_x = precision is not None and _rounds(x, precision)
    as_it_is = slopes is not None and gate is None and _takes_low(x)
    if low is not None and not c.is_dense and not as_it_is:
        wide = partial(
            dendritic_layer,
            connectivity=c,
            activation=activation,
            negative_slope=negative_slope,
            soma_activation=soma_activation,
            precision=precision,
            gate=None if gate is None else gate.float(),
        )
        return _in_float32(wide, low, x, *tensors)
    if slopes is None or connectivity.is_dense or (gate is not None and not _gated.serves()):
        phi = activations.function_of(activation, negative_slope)
        psi = activations.function_of(soma_activation or activation, negative_slope)
        u = sparse_linear(x, synapse_weight, dendrite_bias, connectivity, precision=precision)
        a = phi(u) if gate is None else phi(u) * gate
        y = psi(transforms.cable(a, cable_weight, soma_bias, connectivity))
        return y if low is None else y.to(low)
    if gate is not None:
        rows = gate.expand(*x.shape[:-1], -1).reshape(-1, c.num_dendrites)
        y = _gated.Layer.apply(_flatten(x), *tensors, rows, c, slopes, round_x)
        return _unflatten(y, x)
    y = autograd.layer(_flatten(x), *tensors, c, slopes, round_x)
    return _unflatten(y if low is None else y.to(low), x)


def soma_reduce(
    u: torch.Tensor, connectivity: Connectivity, op: Reduce
) -> tuple[torch.Tensor, torch.Tensor]:
    """One number for each soma of those of its dendrites, and the dendrite that it comes from.

    Args:
        u: [..., R], float64, float32, bfloat16 or float16.
        connectivity: which dendrites each soma owns; its synapses play no part.
        op: "sum"; "max"; "absmax": the number of the largest size, with its sign. Of equal ones the
            dendrite of the lowest number wins. NaN counts as the largest: a soma with one has NaN.

    Returns:
        values [..., S], 0 for a soma without dendrites. The gradient goes to the winner alone, of a
            sum to all.
        winner int32 [..., S], the dendrite's row, from 0 to R - 1. -1 where there is none: for
            somas without dendrites, and for sums.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit, or another op.

    Source: max over dendrites is DENN (Wu et al. 2018), absmax that of active dendrites (Iyer et
        al. 2022); docs/gates.md.
    """
    check_reduce("op", op)
    if not isinstance(connectivity, Connectivity):
        raise TypeError(f"Expected a Connectivity, got {type(connectivity).__name__}")
    rows = connectivity.num_dendrites
    if _require_tensor("u", u).shape[-1:] != (rows,):
        raise ValueError(f"Expected u of shape [..., {rows}], got {list(u.shape)}")
    check_dtype("u", u.dtype)
    return transforms.soma_reduce(u, connectivity, op)


def check_reduce(name: str, op: str) -> None:
    """ValueError unless the reduction has a name."""
    if op not in get_args(Reduce):
        raise ValueError(f"Expected {name} of {sorted(get_args(Reduce))}, got {op!r}")


def k_winners(x: torch.Tensor, k: SupportsIndex) -> torch.Tensor:
    """The k largest of x [..., n] stay, the others become 0. Exactly k stay, of equal ones too.

    Which of equal ones is torch.topk's choice; NaN counts as the largest. Gradients go through the
    winners alone.

    Raises:
        TypeError, ValueError: k is not an integer from 1 to n, x no tensor with a last dimension.
    """
    k = check_size("k", k)
    if _require_tensor("x", x).dim() == 0 or k > x.shape[-1]:
        raise ValueError(f"Expected x of shape [..., {k} or more], got {list(x.shape)}")
    values, winners = x.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(x).scatter(-1, winners, values)
