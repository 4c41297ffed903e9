"""The operators: schemas, fake kernels and dispatch to a backend, all in one place.

Connectivity crosses the dispatcher as its three index tensors, so that torch.compile and
torch.export see plain tensors; the `Connectivity` they come from hangs on the column tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from .backends import Backend, select
from .structure import Connectivity

Maybe = torch.Tensor | None
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_INDICES = "Tensor crow_indices, Tensor col_indices, Tensor soma_ptr"

library = torch.library.Library("dendrite_kernels", "DEF")
library.define(
    "dendritic_forward(Tensor x, Tensor synapse_weight, Tensor? dendrite_bias, Tensor cable_weight,"
    f" Tensor? soma_bias, {_INDICES}, float negative_slope, bool save_signs,"
    " bool round_x=False) -> (Tensor, Tensor)"
)
library.define(
    "dendritic_backward(Tensor grad, Tensor x, Tensor y, Tensor signs, Tensor synapse_weight,"
    f" Tensor? dendrite_bias, Tensor cable_weight, {_INDICES}, float negative_slope, bool need_x)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"sparse_forward(Tensor x, Tensor weight, Tensor? bias, {_INDICES}, bool round_x=False)"
    " -> Tensor"
)
library.define(
    f"sparse_backward(Tensor grad, Tensor x, Tensor weight, {_INDICES}, bool need_x)"
    " -> (Tensor, Tensor, Tensor)"
)

_OWNER = "_dendrite_kernels_connectivity"  # on the columns of a Connectivity: the way back
_FOREIGN = "_dendrite_kernels_foreign"  # on other columns: the last Connectivity made of them


def index_tensors(connectivity: Connectivity) -> Three:
    """The operators' index arguments, marked so that they lead back to `connectivity`."""
    col = connectivity.col_indices
    if not torch.compiler.is_compiling() and not hasattr(col, _OWNER):
        setattr(col, _OWNER, weakref.ref(connectivity))
    return connectivity.crow_indices, col, connectivity.soma_ptr


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


# ---- the backend's functions, for contiguous tensors, and the operators' kernels ----


def _plain(t: torch.Tensor) -> torch.Tensor:
    """What a pointer may read: contiguous, and no sign that a lazy conjugate left pending."""
    return (t.resolve_neg() if t.is_neg() else t).contiguous()


def _plain_or_none(t: Maybe) -> Maybe:
    return None if t is None else _plain(t)


def _check_sample(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """Backends check every operand as it reaches them: of an empty batch none does, and of low
    precision not as it came."""
    if t.dtype is not x.dtype:
        raise TypeError(f"Expected {name} of dtype {x.dtype} like x, got {t.dtype}")
    if t.dim() == 0 or t.shape[0] != x.shape[0]:
        raise ValueError(f"Expected {name} of {x.shape[0]} rows like x, got shape {list(t.shape)}")


LOW = (torch.float16, torch.bfloat16)  # samples may be stored as these; sums are float32


def _samples(backend: Backend, t: torch.Tensor) -> torch.Tensor:
    """x, y or a gradient of theirs as the backend takes it."""
    return _plain(t.float() if t.dtype in LOW and not backend.STORES_LOW else t)


def _parameter(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A parameter as backends take it: float32 beside samples of low precision."""
    return _plain(t.float() if x.dtype in LOW else t)


def _optional(t: Maybe, x: torch.Tensor) -> Maybe:
    return None if t is None else _parameter(t, x)


def _rounded(
    backend: Backend, x: torch.Tensor, round_x: bool
) -> tuple[torch.Tensor, tuple[bool, ...]]:
    """x as the backend takes it, and the last argument if the backend must still round x."""
    if round_x and not backend.ROUNDS_X:
        x, round_x = x.bfloat16().to(x.dtype), False
    return _samples(backend, x), (True,) if round_x else ()


def _rounded_back(
    x: torch.Tensor, parameter: torch.Tensor, gradients: tuple[torch.Tensor, ...]
) -> Any:
    """Gradients of x and of parameters, in their own dtypes."""
    dx, *others = gradients
    return dx.to(x.dtype), *(g.to(parameter.dtype) for g in others)


def _compute_dendritic_forward(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    connectivity: Connectivity,
    negative_slope: float,
    save_signs: bool,
    round_x: bool = False,  # the dispatcher leaves defaults out
) -> tuple[torch.Tensor, torch.Tensor]:
    backend = select(x.device)
    if round_x or x.dtype in LOW:
        samples, rounds = _rounded(backend, x, round_x)
        y, signs = backend.dendritic_forward(
            samples, _parameter(synapse_weight, x), _optional(dendrite_bias, x),
            _parameter(cable_weight, x), _optional(soma_bias, x), connectivity, negative_slope,
            save_signs, *rounds,
        )  # fmt: skip
        return y.to(x.dtype), signs
    return backend.dendritic_forward(
        _plain(x), _plain(synapse_weight), _plain_or_none(dendrite_bias),
        _plain(cable_weight), _plain_or_none(soma_bias), connectivity,
        negative_slope, save_signs,
    )  # fmt: skip


def _compute_dendritic_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    signs: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    connectivity: Connectivity,
    negative_slope: float,
    need_x: bool,
) -> Five:
    _check_sample("grad", grad, x)
    _check_sample("y", y, x)
    backend = select(x.device)
    signs = _plain(signs if signs.dim() == 2 else signs.reshape(-1, connectivity.num_dendrites))
    if x.dtype in LOW:
        gradients = backend.dendritic_backward(
            _samples(backend, grad), _samples(backend, x), _samples(backend, y), signs,
            _parameter(synapse_weight, x), _optional(dendrite_bias, x),
            _parameter(cable_weight, x), connectivity, negative_slope, need_x,
        )  # fmt: skip
        five: Five = _rounded_back(x, synapse_weight, gradients)
        return five
    return backend.dendritic_backward(
        _plain(grad), _plain(x), _plain(y), signs, _plain(synapse_weight),
        _plain_or_none(dendrite_bias), _plain(cable_weight),
        connectivity, negative_slope, need_x,
    )  # fmt: skip


def _compute_sparse_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    connectivity: Connectivity,
    round_x: bool = False,
) -> torch.Tensor:
    backend = select(x.device)
    if round_x or x.dtype in LOW:
        samples, rounds = _rounded(backend, x, round_x)
        parameters = _parameter(weight, x), _optional(bias, x)
        return backend.sparse_forward(samples, *parameters, connectivity, *rounds).to(x.dtype)
    return backend.sparse_forward(_plain(x), _plain(weight), _plain_or_none(bias), connectivity)


def _compute_sparse_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    connectivity: Connectivity,
    need_x: bool,
) -> Three:
    _check_sample("grad", grad, x)
    backend = select(x.device)
    if x.dtype in LOW:
        gradients = backend.sparse_backward(
            _samples(backend, grad), _samples(backend, x), _parameter(weight, x), connectivity,
            need_x,
        )  # fmt: skip
        three: Three = _rounded_back(x, weight, gradients)
        return three
    return backend.sparse_backward(_plain(grad), _plain(x), _plain(weight), connectivity, need_x)


def _kernel(compute: Callable[..., Any], x_at: int, indices_at: int) -> Callable[..., Any]:
    """An operator's kernel: `compute`, told the Connectivity behind the three index tensors.

    x_at and indices_at: the positions of x and of the first index tensor among the arguments.
    """

    def kernel(*args: Any) -> Any:
        end = indices_at + 3
        crow, col, soma_ptr = args[indices_at:end]
        found = connectivity_of(crow, col, soma_ptr, args[x_at])
        return compute(*args[:indices_at], found, *args[end:])

    return kernel


def _flat_signs(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator's signs are flat: a dimension ceil(B / 32) would make the compiler tell
    batches of up to 32 samples, where it is 1, from larger ones."""
    y, signs = _compute_dendritic_forward(*args)
    return y, signs.flatten()


for _name, _function in {
    "dendritic_forward": _kernel(_flat_signs, 0, 5),
    "dendritic_backward": _kernel(_compute_dendritic_backward, 1, 7),
    "sparse_forward": _kernel(_compute_sparse_forward, 0, 3),
    "sparse_backward": _kernel(_compute_sparse_backward, 1, 3),
}.items():
    # One kernel for every device: the backend is chosen by the device of x.
    library.impl(_name, _function, "CompositeExplicitAutograd")

dendritic_forward = torch.ops.dendrite_kernels.dendritic_forward.default
dendritic_backward = torch.ops.dendrite_kernels.dendritic_backward.default
sparse_forward = torch.ops.dendrite_kernels.sparse_forward.default
sparse_backward = torch.ops.dendrite_kernels.sparse_backward.default


# ---- what the rest of the package calls ----

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def observed(x: torch.Tensor, *others: Maybe) -> bool:
    """Whether a compiler, mode, transform, profiler or tensor subclass must see the operator.

    If not, a call skips the dispatcher, whose way into Python costs as much as a small kernel.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return True
    for tensor in others:
        if tensor is not None and type(tensor) not in _PLAIN:
            return True
    return type(x) not in _PLAIN or x.is_meta


def run_dendritic_forward(
    x: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    soma_bias: Maybe,
    connectivity: Connectivity,
    negative_slope: float,
    save_signs: bool,
    round_x: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = synapse_weight, dendrite_bias, cable_weight, soma_bias
    options = negative_slope, save_signs, round_x
    if not observed(x, synapse_weight):
        return _compute_dendritic_forward(x, *parameters, connectivity, *options)
    result: tuple[torch.Tensor, torch.Tensor] = dendritic_forward(
        x, *parameters, *index_tensors(connectivity), *options
    )
    return result


def run_dendritic_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    signs: torch.Tensor,
    synapse_weight: torch.Tensor,
    dendrite_bias: Maybe,
    cable_weight: torch.Tensor,
    connectivity: Connectivity,
    negative_slope: float,
    need_x: bool,
) -> Five:
    if not observed(grad, synapse_weight):
        return _compute_dendritic_backward(
            grad, x, y, signs, synapse_weight, dendrite_bias, cable_weight, connectivity,
            negative_slope, need_x,
        )  # fmt: skip
    tensors = x, y, signs, synapse_weight, dendrite_bias, cable_weight
    options = negative_slope, need_x
    result: Five = dendritic_backward(grad, *tensors, *index_tensors(connectivity), *options)
    return result


def run_sparse_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    connectivity: Connectivity,
    round_x: bool = False,
) -> torch.Tensor:
    if not observed(x, weight):
        return _compute_sparse_forward(x, weight, bias, connectivity, round_x)
    u: torch.Tensor = sparse_forward(x, weight, bias, *index_tensors(connectivity), round_x)
    return u


def run_sparse_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    connectivity: Connectivity,
    need_x: bool,
) -> Three:
    if not observed(grad, weight):
        return _compute_sparse_backward(grad, x, weight, connectivity, need_x)
    result: Three = sparse_backward(grad, x, weight, *index_tensors(connectivity), need_x)
    return result


# ---- the shapes that the operators return: for torch.compile, export and meta tensors ----


@torch.library.register_fake("dendrite_kernels::dendritic_forward", lib=library)
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
    round_x: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    words = (x.shape[0] + 31) // 32 if save_signs else 0
    signs = x.new_empty(words * cable_weight.shape[0], dtype=torch.int32)
    return x.new_empty((x.shape[0], soma_ptr.shape[0] - 1)), signs


@torch.library.register_fake("dendrite_kernels::dendritic_backward", lib=library)
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
) -> Five:
    dx = x.new_empty((x.shape[0] if need_x else 0, x.shape[1]))
    rows, somas = cable_weight.shape[0], soma_ptr.shape[0] - 1
    new = synapse_weight.new_empty
    return dx, new(synapse_weight.shape), new(rows), new(rows), new(somas)


@torch.library.register_fake("dendrite_kernels::sparse_forward", lib=library)
def _fake_sparse_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    round_x: bool = False,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], crow_indices.shape[0] - 1))


@torch.library.register_fake("dendrite_kernels::sparse_backward", lib=library)
def _fake_sparse_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    soma_ptr: torch.Tensor,
    need_x: bool,
) -> Three:
    dx = x.new_empty((x.shape[0] if need_x else 0, x.shape[1]))
    return dx, weight.new_empty(weight.shape), weight.new_empty(crow_indices.shape[0] - 1)


# ---- torch.func.vmap ----


def _sample_by_sample(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule that runs `op` once per sample of the mapped dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        samples = [
            [arg] * info.batch_size if dim is None else arg.unbind(dim)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        outputs = [op(*sample) for sample in zip(*samples, strict=True)]
        if isinstance(outputs[0], torch.Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(
            outputs[0]
        )

    return rule


def _vmap_sparse_forward(
    info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, *parameters: Any
) -> tuple[torch.Tensor, int]:
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        result: tuple[torch.Tensor, int] = _sample_by_sample(sparse_forward)(
            info, in_dims, x, *parameters
        )
        return result
    x = x.movedim(in_dims[0], 0)  # one network, many batches: one larger batch
    return sparse_forward(x.flatten(0, 1), *parameters).unflatten(0, x.shape[:2]), 0


torch.library.register_vmap(sparse_forward, _vmap_sparse_forward, lib=library)
for _op in (dendritic_forward, dendritic_backward, sparse_backward):
    torch.library.register_vmap(_op, _sample_by_sample(_op), lib=library)
