"""Forward and every gradient of both operations against the float64 oracle, on every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, activations
from dendrite_kernels.transposed import build_transposed_plan
from tests import oracle

BATCHES = [0, 1, 2, 31, 33, 128, 1000]


def ragged(inputs: int, rows: int, soma_ptr: list[int], seed: int = 0) -> Connectivity:
    """Rows of 0 to 40 synapses, several of them empty; somas of the given unequal sizes."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, min(40, inputs) + 1, rows)
    counts[::5] = 0
    columns = [np.sort(rng.choice(inputs, k, replace=False)) for k in counts]
    return Connectivity.from_csr(
        np.cumsum([0, *counts]), np.concatenate(columns), inputs, soma_ptr=soma_ptr
    )


def many_slots() -> Connectivity:
    """Its plan, made before anybody asks for it, has more slots in a block than a uint16 counts."""
    c = dk.connectivity.random(200, 64, 16, 150, seed=0)
    crow = c.crow_indices.numpy()
    c.cached("transposed", lambda: build_transposed_plan(crow, c.columns, block_rows=1000))
    return c


NETWORKS: dict[str, Callable[[], Connectivity]] = {
    "constant fan-in": lambda: dk.connectivity.random(100, 12, 4, 16, constant_fan_in=True, seed=0),
    "fan-in 7": lambda: dk.connectivity.random(90, 5, 3, 7, constant_fan_in=True, seed=0),
    "variable fan-in": lambda: dk.connectivity.random(100, 12, 4, 16, seed=0),
    "ragged": lambda: ragged(61, 40, [0, 0, 1, 7, 7, 36, 40]),
    "receptive fields": lambda: dk.connectivity.local_receptive_fields((9, 7), 150, 3, 16, seed=0),
    "colour": lambda: dk.connectivity.global_receptive_fields((8, 8), 6, 4, 16, channels=3, seed=0),
    "D=1": lambda: dk.connectivity.random(50, 37, 1, 8, seed=0),
    "S=1": lambda: dk.connectivity.random(50, 1, 70, 9, seed=0),
    "N=1": lambda: Connectivity.from_csr([0, 1, 1, 2, 3], [0, 0, 0], 1, dendrites_per_soma=2),
    "no synapse": lambda: Connectivity.from_csr([0, 0, 0, 0], [], 5, soma_ptr=[0, 2, 3]),
    "wide": lambda: dk.connectivity.random(65537, 9, 4, 12, constant_fan_in=True, seed=0),
    "several blocks": lambda: dk.connectivity.random(40, 130, 18, 5, seed=0),
    "blocks of many slots": many_slots,
}


# Every network with every batch; large ones only with a few, where an oracle is quick.
FEW = {
    "wide": (0, 2, 33),
    "several blocks": (0, 1, 33, 300),
    "blocks of many slots": (0, 2, 128),
}
F32, F64 = torch.float32, torch.float64
# Sizes, tails and tiles do not depend on the dtype: test_fuzz.py draws both at random.
CASES = [(name, b, F32) for name in NETWORKS for b in FEW.get(name, BATCHES)]
CASES += [(name, b, F64) for name in NETWORKS for b in FEW.get(name, (2, 33, 128))[1:]]
every_case = pytest.mark.parametrize(
    ("network", "batch", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch.")
)
kernels = pytest.mark.parametrize("backend", ["cpp", "numba"], indirect=True)


def test_networks_have_blocks_of_few_and_of_many_slots() -> None:
    """Positions in them are uint16 or int32."""
    narrow, wide = (
        NETWORKS[name]().transposed.slot.itemsize
        for name in ("several blocks", "blocks of many slots")
    )
    assert (narrow, wide) == (2, 4)


def draw(c: Connectivity, batch: int, dtype: torch.dtype, somas: bool) -> list[torch.Tensor]:
    """x with many zeros, then the parameters, scaled to keep activations near 1."""
    x = torch.randn(batch, c.in_features, dtype=dtype)
    x[:, ::3] = 0
    fan_in = max(1.0, c.nnz / c.num_dendrites)
    weight = torch.randn(c.nnz, dtype=dtype) / fan_in**0.5
    bias = torch.randn(c.num_dendrites, dtype=dtype)
    bias[::4] = 0  # with zero inputs this gives u == 0 exactly
    if not somas:
        return [x, weight, bias]
    cable = torch.randn(c.num_dendrites, dtype=dtype) / (c.num_dendrites / c.num_somas) ** 0.5
    soma_bias = torch.randn(c.num_somas, dtype=dtype)
    soma_bias += 2 * soma_bias.sign()  # an output that cancels would measure luck, too
    return [x, weight, bias, cable, soma_bias]


def draw_grad(batch: int, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Of mean 1: a sum over the batch that cancels would measure luck, not the kernel."""
    return torch.randn(batch, outputs, dtype=dtype) + 1


Function = Callable[..., torch.Tensor]


def gradients(
    function: Function, tensors: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the gradients of all inputs, in the dtype of `tensors`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_as_exact_as_torch(
    ours: list[torch.Tensor],
    plain: list[torch.Tensor],
    exact: list[torch.Tensor],
    floor: float | None = None,
) -> None:
    """Relative L2 error at most `floor` or twice that of plain torch in the same dtype."""
    names = ["output", "x", "weight", "bias", "cable", "soma bias"]
    if floor is None:
        floor = 1e-6 if ours[0].dtype == torch.float32 else 1e-14
    measured = oracle.errors(ours, exact), oracle.errors(plain, exact)
    for name, error, reference in zip(names[: len(ours)], *measured, strict=True):
        assert error <= max(floor, 2 * reference), (name, error, reference)


@cache
def judged(network: str, batch: int, dtype: torch.dtype, somas: bool) -> tuple[Any, ...]:
    """A case and what the oracle and plain torch make of it, once for all backends."""
    torch.manual_seed(0)
    c = NETWORKS[network]()
    tensors = draw(c, batch, dtype, somas)
    grad = draw_grad(batch, c.num_somas if somas else c.num_dendrites, dtype)
    return c, tensors, grad, *references(c, tensors, grad, somas)


def references(
    c: Connectivity, tensors: list[torch.Tensor], grad: torch.Tensor, somas: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients in float64, and those of plain torch in the dtype of `tensors`."""
    wide = [t.double() for t in tensors]
    if somas:
        return (
            gradients(lambda *t: oracle.dendritic_layer(*t, c, 0.1), wide, grad),
            gradients(lambda *t: dk.reference.dendritic_layer(*t, c), tensors, grad),
        )
    return (
        gradients(lambda *t: oracle.sparse_linear(*t, c), wide, grad),
        gradients(lambda *t: dk.reference.sparse_linear(*t, c), tensors, grad),
    )


@every_case
def test_dendritic_layer_is_exact(
    backend: str, network: str, batch: int, dtype: torch.dtype
) -> None:
    c, tensors, grad, exact, plain = judged(network, batch, dtype, True)
    ours = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)
    assert_as_exact_as_torch(ours, plain, exact)


@every_case
def test_sparse_linear_is_exact(backend: str, network: str, batch: int, dtype: torch.dtype) -> None:
    c, tensors, grad, exact, plain = judged(network, batch, dtype, False)
    ours = gradients(lambda *t: dk.functional.sparse_linear(*t, c), tensors, grad)
    assert_as_exact_as_torch(ours, plain, exact)


LONG_SUMS = {
    "rows of 5000": lambda: dk.connectivity.random(8000, 16, 4, 5000, seed=0),
    "rows of 400": lambda: dk.connectivity.random(784, 256, 4, 392, seed=0),
    "columns of 4096": lambda: dk.connectivity.random(16, 1024, 16, 4, seed=0),
}


@cache
def long_sums(network: str, batch: int, somas: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    c = LONG_SUMS[network]()
    if somas:
        tensors, grad = draw(c, batch, F32, somas), draw_grad(batch, c.num_somas, F32)
    else:
        sizes = (batch, c.in_features), (c.nnz,), (c.num_dendrites,)
        tensors = [torch.randn(size) for size in sizes]
        grad = torch.randn(batch, c.num_dendrites)
    return c, tensors, grad, *references(c, tensors, grad, somas)


@kernels  # "reference" is plain torch
@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("network", LONG_SUMS)
def test_long_sums_round_off_no_more_than_plain_torch(
    backend: str, network: str, batch: int
) -> None:
    """Thousands of products added up one by one would have five times its error."""
    c, tensors, grad, exact, plain = long_sums(network, batch, False)
    ours = gradients(lambda *t: dk.functional.sparse_linear(*t, c), tensors, grad)
    assert_as_exact_as_torch(ours, plain, exact, floor=0)


@kernels
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_cable_gradients_of_long_rows(backend: str, batch: int) -> None:
    c, tensors, grad, exact, plain = long_sums("rows of 5000", batch, True)
    ours = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)
    assert_as_exact_as_torch(ours, plain, exact, floor=0)


@kernels
@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        ((60, 100, 40, 6), 70),  # 4 blocks, 2 or 3 tiles
        ((60, 10, 40, 6), 1000),  # 1 block, many tiles
        ((500, 100, 40, 16), 400),  # x larger than the cache
        ((60, 100, 40, 6), 3),  # 1 tile
    ],
)
def test_every_thread_count_and_every_strategy_is_exact(
    backend: str, sizes: tuple[int, int, int, int], batch: int
) -> None:
    """Few and many blocks and tiles: threads own blocks of dendrites, or tiles of the batch."""
    c = dk.connectivity.random(*sizes, seed=1)
    tensors = draw(c, batch, torch.float64, somas=True)
    grad = torch.randn(batch, c.num_somas, dtype=torch.float64)
    exact = gradients(lambda *t: oracle.dendritic_layer(*t, c, 0.1), tensors, grad)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)
            again = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)
            assert max(oracle.errors(first, exact)) < 1e-13, threads
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), threads
    finally:
        torch.set_num_threads(before)


@kernels  # gradients of "reference" are torch's own
@pytest.mark.parametrize("somas", [True, False], ids=["dendritic", "sparse"])
@pytest.mark.parametrize("kind", ["constant fan-in", "ragged"])
def test_gradcheck(backend: str, kind: str, somas: bool) -> None:
    small = {
        "constant fan-in": lambda: dk.connectivity.random(7, 3, 2, 4, constant_fan_in=True, seed=3),
        "ragged": lambda: ragged(7, 6, [0, 1, 1, 4, 6], seed=3),
    }
    c = small[kind]()
    leaves = [t.requires_grad_() for t in draw(c, 5, torch.float64, somas)]
    with torch.no_grad():  # u == 0 is a kink, where finite differences mean nothing
        leaves[2].add_(0.3)
    function = dk.functional.dendritic_layer if somas else dk.functional.sparse_linear
    assert torch.autograd.gradcheck(lambda *t: function(*t, c), leaves)


def test_derivative_at_zero_is_the_slope(backend: str) -> None:
    """PyTorch's convention: u == 0 counts as inactive, in dendrites and in somas."""
    c = Connectivity.from_csr([0, 1, 2], [0, 0], 1, soma_ptr=[0, 1, 2])
    x = torch.zeros(3, 1, requires_grad=True)
    weight, cable = torch.tensor([2.0, -3.0]), torch.tensor([5.0, 7.0])
    y = dk.functional.dendritic_layer(x, weight, None, cable, None, c, negative_slope=0.25)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(3, 2))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3, 1), (2 * 5 - 3 * 7) * 0.25 * 0.25))


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0, 2.5])
def test_slopes(backend: str, slope: float) -> None:
    c = ragged(30, 20, [0, 4, 9, 20])
    tensors = draw(c, 40, torch.float64, somas=True)
    grad = torch.randn(40, 3, dtype=torch.float64)
    exact = gradients(lambda *t: oracle.dendritic_layer(*t, c, slope), tensors, grad)
    ours = gradients(
        lambda *t: dk.functional.dendritic_layer(*t, c, negative_slope=slope), tensors, grad
    )
    assert max(oracle.errors(ours, exact)) < 1e-13


@pytest.mark.parametrize("activation", activations._TABLE)
def test_other_activations(backend: str, activation: str) -> None:
    c = ragged(30, 20, [0, 4, 9, 20])
    tensors = draw(c, 40, torch.float64, somas=True)
    grad = torch.randn(40, 3, dtype=torch.float64)
    options = {"activation": activation}
    exact = gradients(lambda *t: dk.reference.dendritic_layer(*t, c, **options), tensors, grad)
    ours = gradients(lambda *t: dk.functional.dendritic_layer(*t, c, **options), tensors, grad)
    assert max(oracle.errors(ours, exact)) < 1e-13


@pytest.mark.parametrize("somas", [True, False], ids=["dendritic", "sparse"])
def test_dense_synapses_are_a_matrix_product(backend: str, somas: bool) -> None:
    c = dk.connectivity.all_to_all(20, 6, 3)
    tensors = draw(c, 33, torch.float64, somas)
    outputs = c.num_somas if somas else c.num_dendrites
    grad = torch.randn(33, outputs, dtype=torch.float64)
    if somas:
        exact = gradients(lambda *t: oracle.dendritic_layer(*t, c, 0.1), tensors, grad)
        ours = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)
    else:
        exact = gradients(lambda *t: oracle.sparse_linear(*t, c), tensors, grad)
        ours = gradients(lambda *t: dk.functional.sparse_linear(*t, c), tensors, grad)
    assert max(oracle.errors(ours, exact)) < 1e-13


def views(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of x [B, N] under other strides."""
    yield "transposed", x.t().contiguous().t()
    wide = torch.full((2 * x.shape[0], 3 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[::2, 1::3] = x
    yield "strided", wide[::2, 1::3]
    offset = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    offset[1:] = x.flatten()
    yield "offset", offset[1:].reshape(x.shape)


@pytest.mark.parametrize("somas", [True, False], ids=["dendritic", "sparse"])
def test_strided_inputs_and_gradients(backend: str, somas: bool) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    tensors = draw(c, 35, torch.float64, somas)
    outputs = c.num_somas if somas else c.num_dendrites
    grad = torch.randn(35, outputs, dtype=torch.float64)
    function = dk.functional.dendritic_layer if somas else dk.functional.sparse_linear

    def run(x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_(), *(t.clone().requires_grad_() for t in tensors[1:])]
        y = function(*leaves, c)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    expected = run(tensors[0], grad)
    for (name, x), (_, g) in zip(views(tensors[0]), views(grad), strict=True):
        assert not x.is_contiguous() or name == "offset"
        for found, wanted in zip(run(x, g), expected, strict=True):
            assert oracle.same(found, wanted, backend), name


@pytest.mark.parametrize("somas", [True, False], ids=["dendritic", "sparse"])
def test_expanded_inputs_and_gradients(backend: str, somas: bool) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    tensors = draw(c, 1, torch.float64, somas)
    function = dk.functional.dendritic_layer if somas else dk.functional.sparse_linear
    row = tensors[0].requires_grad_()
    y = function(row.expand(5, 30), *tensors[1:], c)
    y.sum().backward()  # the gradient of a sum is an expanded scalar
    assert oracle.same(y[0], y[4], backend)
    one = tensors[0].detach().clone().requires_grad_()
    (5 * function(one, *tensors[1:], c).sum()).backward()
    assert row.grad is not None
    assert one.grad is not None
    assert oracle.relative_error(row.grad, one.grad) < 1e-14


@pytest.mark.parametrize("shape", [(30,), (4, 30), (2, 3, 30), (2, 0, 30), (1, 1, 1, 30)])
def test_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    layer, linear = dk.DendriticLayer(c), dk.SparseLinear(c)
    x = torch.randn(shape)
    flat = x.reshape(-1, 30)
    assert layer(x).shape == (*shape[:-1], 10)
    assert oracle.same(layer(x).reshape(-1, 10), layer(flat), backend)
    assert linear(x).shape == (*shape[:-1], 40)
    assert oracle.same(linear(x).reshape(-1, 40), linear(flat), backend)


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_parameters_and_inputs_get_no_gradient(backend: str, frozen: int) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    tensors = draw(c, 35, torch.float64, somas=True)
    grad = torch.randn(35, 10, dtype=torch.float64)
    expected = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)[1:]
    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    dk.functional.dendritic_layer(*leaves, c).backward(grad)
    for i, (leaf, e) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is None) == (i == frozen)
        assert leaf.grad is None or oracle.relative_error(leaf.grad, e) < 1e-14


def test_without_biases(backend: str) -> None:
    c = ragged(30, 20, [0, 4, 9, 20])
    x, weight, _, cable, _ = draw(c, 40, torch.float64, somas=True)
    grad = torch.randn(40, 3, dtype=torch.float64)
    exact = gradients(
        lambda x, w, v: oracle.dendritic_layer(x, w, None, v, None, c, 0.1),
        [x, weight, cable],
        grad,
    )
    ours = gradients(
        lambda x, w, v: dk.functional.dendritic_layer(x, w, None, v, None, c),
        [x, weight, cable],
        grad,
    )
    assert max(oracle.errors(ours, exact)) < 1e-13


def test_no_grad_gives_the_same_values(backend: str) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, seed=0)
    layer, linear, x = dk.DendriticLayer(c), dk.SparseLinear(c), torch.randn(40, 30)
    with torch.no_grad():
        quiet = layer(x), linear(x)
    assert oracle.same(quiet[0], layer(x), backend)
    assert oracle.same(quiet[1], linear(x), backend)
    assert not quiet[0].requires_grad


@kernels  # reference is dense: 0 * NaN
def test_nan_and_infinity_pass_through(backend: str) -> None:
    c = dk.connectivity.random(30, 10, 4, 6, constant_fan_in=True, seed=0)
    layer = dk.DendriticLayer(c)
    x = torch.randn(40, 30)
    x[7, 3], x[9, 5] = torch.nan, torch.inf
    y = layer(x)
    sees = c.to_mask().reshape(10, 4, 30).any(1)  # [S, N]
    assert torch.equal(y[7].isnan(), sees[:, 3])
    assert not y[9].isfinite()[sees[:, 5]].any()
    clean = torch.ones(40, dtype=torch.bool)
    clean[[7, 9]] = False
    assert y[clean].isfinite().all()


def test_backward_keeps_no_activations(backend: str) -> None:
    """x, y, the parameters and one bit per dendrite and sample: nothing of [B, R] floats."""
    c = dk.connectivity.random(50, 8, 16, 6, seed=0)
    layer = dk.DendriticLayer(c)
    x = torch.randn(96, 50, requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    known = {t.data_ptr() for t in (x, y, *layer.parameters())}
    others = [t for t in saved if t.data_ptr() not in known]
    assert [(t.dtype, t.numel()) for t in others] == [(torch.int32, 96 // 32 * 128)]
    bits = sum(8 * t.numel() * t.element_size() for t in others)
    assert bits == 96 * 128
    y.sum().backward()


def test_reference_agrees_with_the_masked_dense_equations() -> None:
    """dk.reference against F.linear under masks, the form in which the paper states the model."""
    c = ragged(30, 20, [0, 4, 9, 20])
    x, weight, bias, cable, soma_bias = draw(c, 40, torch.float64, somas=True)
    w = torch.zeros(20, 30, dtype=torch.float64)
    w[c.to_mask()] = weight
    m = torch.zeros(3, 20, dtype=torch.float64)
    for s, (begin, end) in enumerate([(0, 4), (4, 9), (9, 20)]):
        m[s, begin:end] = cable[begin:end]
    a = F.leaky_relu(F.linear(x, w, bias), 0.1)
    expected = F.leaky_relu(F.linear(a, m, soma_bias), 0.1)
    assert torch.allclose(
        dk.reference.dendritic_layer(x, weight, bias, cable, soma_bias, c), expected, atol=1e-14
    )
