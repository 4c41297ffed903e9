"""The operators: one pair, forward and backward; schemas, fake kernels and dispatch to a backend.

Without a cable a layer is sparse linear: y are its dendrites [B, R], and there are no signs.

Connectivity crosses the dispatcher as its three index tensors, so that torch.compile and
torch.export see plain tensors; the `Connectivity` they come from hangs on the column tensor.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._subclasses import FakeTensor
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.flop_counter import register_flop_formula

from .activations import check_slope
from .backends import select
from .backends.protocol import AdamStep, Backend, Gradients, Maybe, Operands, Slopes
from .structure import Connectivity

Two = tuple[torch.Tensor, torch.Tensor]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_INDICES = "Tensor crow_indices, Tensor col_indices, Tensor soma_ptr"

library = torch.library.Library("dendrite_kernels", "DEF")
library.define(
    "forward(Tensor x, Tensor synapse_weight, Tensor? dendrite_bias, Tensor? cable_weight,"
    f" Tensor? soma_bias, {_INDICES}, float negative_slope, float soma_slope,"
    " bool save_signs, bool round_x=False) -> (Tensor, Tensor)"
)
library.define(
    "backward(Tensor grad, Tensor x, Tensor? y, Tensor? signs, Tensor synapse_weight,"
    f" Tensor? dendrite_bias, Tensor? cable_weight, {_INDICES}, float negative_slope,"
    " float soma_slope, bool need_x)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_OWNER = "_dendrite_kernels_connectivity"  # on the columns of a Connectivity: the way back
_FOREIGN = "_dendrite_kernels_foreign"  # on other columns: the last Connectivity made of them


def _nobody() -> None:
    """What the pickle of an _Owner becomes."""


class _Owner(weakref.ref[Connectivity]):
    """A weak reference that does not keep a tensor with it from being pickled."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nobody, ()


torch.serialization.add_safe_globals([_nobody])  # torch.load(weights_only=True)


def index_tensors(connectivity: Connectivity, x: Maybe = None) -> Three:
    """The operators' index arguments beside x, marked so that they lead back to `connectivity`."""
    col = connectivity.col_indices
    if not is_compiling() and getattr(col, _OWNER, None) is None:
        setattr(col, _OWNER, _Owner(connectivity))
    return beside(x, connectivity.crow_indices), beside(x, col), beside(x, connectivity.soma_ptr)


def beside(x: Maybe, index: torch.Tensor) -> torch.Tensor:
    """An index tensor as operations take it beside x: a FakeTensorMode may refuse ordinary ones."""
    if isinstance(x, FakeTensor) and not x.fake_mode.allow_non_fake_inputs:
        index = x.fake_mode.from_tensor(index, static_shapes=True)
    return index


def known_connectivity(
    crow: torch.Tensor, col: torch.Tensor, soma_ptr: torch.Tensor
) -> Connectivity | None:
    """The living Connectivity whose index tensors these are."""
    owner = getattr(col, _OWNER, None)
    found: Connectivity | None = owner() if owner is not None else None
    if found is not None and found.crow_indices is crow and found.soma_ptr is soma_ptr:
        return found
    return None


def connectivity_of(
    crow: torch.Tensor, col: torch.Tensor, soma_ptr: torch.Tensor, x: torch.Tensor
) -> Connectivity:
    """The Connectivity behind index tensors; unknown ones are validated and remembered."""
    if x.dim() != 2:
        raise ValueError(f"Expected x of shape [B, N], got {list(x.shape)}")
    found = known_connectivity(crow, col, soma_ptr)
    if found is not None:
        return found
    key = crow, soma_ptr, x.shape[1]
    remembered = getattr(col, _FOREIGN, None)
    if remembered is None or not _same(remembered[0], key):
        remembered = key, Connectivity.from_csr(crow, col, x.shape[1], soma_ptr)
        setattr(col, _FOREIGN, remembered)
    foreign: Connectivity = remembered[1]
    return foreign


def _same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return a[0] is b[0] and a[1] is b[1] and a[2] == b[2]


# ---- the backend's functions, for tensors of any strides and of low precision ----


def _plain(t: torch.Tensor) -> torch.Tensor:
    """What a pointer may read: contiguous, and no sign that a lazy conjugate left pending."""
    return (t.resolve_neg() if t.is_neg() else t).contiguous()


LOW = (torch.float16, torch.bfloat16)  # samples may be stored as these; sums are float32


def _samples(backend: Backend, t: torch.Tensor) -> torch.Tensor:
    """x, y or a gradient of theirs as the backend takes it."""
    return _plain(t.float() if t.dtype in LOW and not backend.STORES_LOW else t)


def _check_sample(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """Backends check every operand as it reaches them: of an empty batch none does, and of low
    precision not as it came."""
    if t.dtype is not x.dtype:
        raise TypeError(f"Expected {name} of dtype {x.dtype} like x, got {t.dtype}")
    if t.dim() == 0 or t.shape[0] != x.shape[0]:
        raise ValueError(f"Expected {name} of {x.shape[0]} rows like x, got shape {list(t.shape)}")


def _operands(
    x: torch.Tensor,
    parameters: tuple[torch.Tensor, Maybe, Maybe, Maybe],
    indices: Three,
    slopes: Slopes,
) -> Operands:
    """Operands as backends take them: plain, and float32 beside samples of low precision."""
    for slope in slopes:
        check_slope(slope)
    connectivity = connectivity_of(*indices, x)
    if parameters[2] is None and parameters[3] is not None:
        raise ValueError("Expected no soma_bias without cable_weight, got one")
    if x.dtype in LOW:
        parameters = tuple(None if t is None else t.float() for t in parameters)  # type: ignore[assignment]
    weight, dendrite_bias, cable_weight, soma_bias = parameters
    return Operands(
        _plain(weight),
        None if dendrite_bias is None else _plain(dendrite_bias),
        None if cable_weight is None else _plain(cable_weight),
        None if soma_bias is None else _plain(soma_bias),
        connectivity,
        *slopes,
    )


def _forward(
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
    round_x: bool = False,  # the dispatcher leaves defaults out
) -> Two:
    """y and the sign words, flat: a dimension ceil(B / 32) would make the compiler tell batches of
    up to 32 samples, where it is 1, from larger ones.
    """
    parameters = synapse_weight, dendrite_bias, cable_weight, soma_bias
    indices, slopes = (crow_indices, col_indices, soma_ptr), (negative_slope, soma_slope)
    operands = _operands(x, parameters, indices, slopes)
    backend, dtype = select(x.device), x.dtype
    if round_x and not backend.ROUNDS_X:
        x, round_x = x.bfloat16().to(dtype), False
    save_signs = save_signs and cable_weight is not None
    y, signs = backend.forward(_samples(backend, x), operands, save_signs, round_x)
    return y if y.dtype is dtype else y.to(dtype), signs.flatten()


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: Maybe,
    signs: Maybe,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: Maybe,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    negative_slope: float,
    soma_slope: float,
    need_x: bool,
    step: AdamStep | None = None,
) -> Gradients:
    parameters = synapse_weight, dendrite_bias, cable_weight, None
    indices, slopes = (crow_indices, col_indices, soma_ptr), (negative_slope, soma_slope)
    operands = _operands(x, parameters, indices, slopes)
    backend = select(x.device)
    _check_sample("grad", grad, x)
    if cable_weight is None:
        y = signs = None
    elif y is None or signs is None:
        raise ValueError("Expected y and signs with cable_weight, got None")
    else:
        _check_sample("y", y, x)
        y, rows = _samples(backend, y), operands.connectivity.num_dendrites
        signs = _plain(signs if signs.dim() == 2 else signs.reshape(-1, rows))
    stepping = {} if step is None else {"step": step}
    gradients = backend.backward(
        _samples(backend, grad), _samples(backend, x), y, signs, operands, need_x, **stepping
    )
    if x.dtype not in LOW:
        return gradients
    dx, dw, dbd, dc, dbs = gradients
    own = synapse_weight.dtype
    return dx.to(x.dtype), dw.to(own), dbd.to(own), dc.to(own), dbs.to(own)


library.impl("forward", _forward, "CompositeExplicitAutograd")  # one kernel for every device:
library.impl("backward", _backward, "CompositeExplicitAutograd")  # the backend is chosen by x's

_forward_op = torch.ops.dendrite_kernels.forward.default
_backward_op = torch.ops.dendrite_kernels.backward.default

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def observed() -> bool:
    """Whether a compiler, tracer, mode, transform or profiler must see the operator."""
    return (
        is_compiling()  # first: the compiler guards whatever it reads before it
        or _len_torch_dispatch_stack() > 0
        or (_len_torch_function_stack() > 0 and _function_mode())
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
    )


def _function_mode() -> bool:
    """Whether a mode sees functions of torch; `with torch.device(...)` sees factories only."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def needs_dispatch(*tensors: Maybe) -> bool:
    """Whether a call must not skip the dispatcher, whose way costs as much as a small kernel:
    something observes it, or a tensor is of a subclass or without memory (on meta, or a ZeroTensor,
    which the dispatcher fills).
    """
    if observed():
        return True
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or (
            not tensor.data_ptr() and (tensor.numel() or tensor.is_meta)
        ):
            return True
    return False


def forward(*args: Any) -> Two:
    """The operator `forward`, below autograd. Arguments as in its schema."""
    if not needs_dispatch(*args[:5]):
        return _forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        both: Two = _forward_op(*args)
    return both


def backward(*args: Any, step: AdamStep | None = None) -> Gradients:
    """The operator `backward`, which records nothing. Arguments as in its schema.

    With a step, which no operator takes, the synapse weight is stepped in place and dw is [0].
    """
    if step is not None or not needs_dispatch(*args[:7]):
        return _backward(*(*args, step))
    gradients: Gradients = _backward_op(*args)
    return gradients


# ---- the shapes that the operators return: for torch.compile, export and meta tensors ----


def refuse_onnx() -> None:
    """RuntimeError in torch.onnx.export, which else says less, and in the words of its own code."""
    onnx = sys.modules.get("torch.onnx")  # importing it takes half a second
    if onnx is not None and onnx.is_in_onnx_export():
        raise RuntimeError(
            "Expected a model of operators that ONNX has, got dendrite_kernels::forward: "
            "export dendrite_kernels.interop.portable(model)"
        )


@functools.cache
def refuse_onnx_later() -> None:
    """The same error in torch.onnx.export of a program that torch.jit.trace records."""
    from torch.onnx import register_custom_op_symbolic  # type: ignore[attr-defined]

    register_custom_op_symbolic("dendrite_kernels::forward", lambda *_: refuse_onnx(), 1)


@torch.library.register_fake("dendrite_kernels::forward", lib=library)
def _fake_forward(
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
) -> Two:
    refuse_onnx()
    rows = crow_indices.shape[0] - 1
    outputs = rows if cable_weight is None else soma_ptr.shape[0] - 1
    words = (x.shape[0] + 31) // 32 if save_signs and cable_weight is not None else 0
    return x.new_empty((x.shape[0], outputs)), x.new_empty(words * rows, dtype=torch.int32)


@torch.library.register_fake("dendrite_kernels::backward", lib=library)
def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: Maybe,
    signs: Maybe,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: Maybe,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    negative_slope: float,
    soma_slope: float,
    need_x: bool,
) -> Gradients:
    dx = x.new_empty((x.shape[0] if need_x else 0, x.shape[1]))
    new, rows = synapse_weight.new_empty, crow_indices.shape[0] - 1
    dendrites, somas = (0, 0) if cable_weight is None else (rows, soma_ptr.shape[0] - 1)
    return dx, new(synapse_weight.shape), new(rows), new(dendrites), new(somas)


# ---- torch.func.vmap ----


def _sample_by_sample(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule that runs `op` once per sample of the mapped dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        samples = [
            [arg] * info.batch_size if dim is None else arg.unbind(dim)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        outputs = [op(*sample) for sample in zip(*samples, strict=True)]
        parts = [torch.stack(part) for part in zip(*outputs, strict=True)]
        return tuple(parts), (0,) * len(parts)

    return rule


def _vmap_forward(
    info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, *rest: Any
) -> tuple[Two, tuple[int, int | None]]:
    save_signs = rest[9]
    if in_dims[0] is None or save_signs or any(dim is not None for dim in in_dims[1:]):
        result: tuple[Two, tuple[int, int]] = _sample_by_sample(_forward_op)(
            info, in_dims, x, *rest
        )
        return result
    x = x.movedim(in_dims[0], 0)  # one network, many batches: one larger batch
    y, signs = _forward_op(x.flatten(0, 1), *rest)
    return (y.unflatten(0, x.shape[:2]), signs), (0, None)


torch.library.register_vmap(_forward_op, _vmap_forward, lib=library)
torch.library.register_vmap(_backward_op, _sample_by_sample(_backward_op), lib=library)


# ---- torch.utils.flop_counter: a product and a sum are two, as for nn.Linear ----


@register_flop_formula(torch.ops.dendrite_kernels.forward)
def _forward_flops(x: Any, weight: Any, _: Any, cable: Any, *__: Any, **___: Any) -> int:
    """One product and sum for each weight and sample. Arguments are shapes."""
    return 2 * int(x[0] * (weight[0] + (cable[0] if cable else 0)))


@register_flop_formula(torch.ops.dendrite_kernels.backward)
def _backward_flops(
    _: Any, x: Any, __: Any, ___: Any, weight: Any, ____: Any, cable: Any, *rest: Any, **_____: Any
) -> int:
    """One for the gradient of each weight, and one for the gradient that goes through it."""
    need_x = rest[-1]
    return 2 * int(x[0] * (weight[0] * (2 if need_x else 1) + (2 * cable[0] if cable else 0)))
