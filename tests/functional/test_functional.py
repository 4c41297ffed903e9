"""Forward and every gradient of both operations against the float64 oracle, on every backend."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, activations
from tests import oracle
from tests.marks import kernels
from tests.networks import NETWORKS, draw, draw_grad, gradients, ragged

BATCHES = [0, 1, 2, 31, 33, 128, 1000]
# Large networks: the oracle is slow on the other batches.
FEW = {
    "wide": (0, 2, 33),
    "several blocks": (0, 1, 33, 300),
    "blocks of many slots": (0, 2, 128),
}
F32, F64 = torch.float32, torch.float64
# Few float64 cases: tests/properties draws sizes and dtypes together, at random.
CASES = [(name, b, F32) for name in NETWORKS for b in FEW.get(name, BATCHES)]
CASES += [(name, b, F64) for name in NETWORKS for b in FEW.get(name, (2, 33, 128))[1:]]
every_case = pytest.mark.parametrize(
    ("network", "batch", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch.")
)


def test_networks_have_blocks_of_few_and_of_many_slots() -> None:
    """Kernels read their slots as uint16 or as int32."""
    narrow, wide = (
        NETWORKS[name]().transposed.slot.itemsize
        for name in ("several blocks", "blocks of many slots")
    )
    assert (narrow, wide) == (2, 4)


BOUND = {torch.float32: 1e-6, torch.float64: 1e-14}
NAMES = ["output", "x", "weight", "bias", "cable", "soma bias"]


def assert_exact(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Relative L2 error at most that of a few roundings in the dtype of `ours`."""
    for name, error in zip(NAMES[: len(ours)], oracle.errors(ours, exact), strict=True):
        assert error <= BOUND[ours[0].dtype], (name, error)


@cache
def judged(network: str, batch: int, dtype: torch.dtype, somas: bool) -> tuple[Any, ...]:
    """A case with the results of the oracle, computed once for all backends."""
    torch.manual_seed(0)
    c = NETWORKS[network]()
    tensors = draw(c, batch, dtype, somas)
    grad = draw_grad(batch, c.num_somas if somas else c.num_dendrites, dtype)
    return c, tensors, grad, exact_gradients(c, tensors, grad)


def exact_gradients(
    c: Connectivity, tensors: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """Output and gradients of the oracle: of a layer if `tensors` include a cable weight."""
    wide = [t.double() for t in tensors]
    if len(tensors) == 5:
        return gradients(lambda *t: oracle.dendritic_layer(*t, c, 0.1), wide, grad)
    return gradients(lambda *t: oracle.sparse_linear(*t, c), wide, grad)


@every_case
def test_dendritic_layer_is_exact(
    backend: str, network: str, batch: int, dtype: torch.dtype
) -> None:
    c, tensors, grad, exact = judged(network, batch, dtype, True)
    ours = gradients(lambda *t: dk.functional.dendritic_layer(*t, c), tensors, grad)
    assert_exact(ours, exact)


@every_case
def test_sparse_linear_is_exact(backend: str, network: str, batch: int, dtype: torch.dtype) -> None:
    c, tensors, grad, exact = judged(network, batch, dtype, False)
    ours = gradients(lambda *t: dk.functional.sparse_linear(*t, c), tensors, grad)
    assert_exact(ours, exact)


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


@pytest.mark.parametrize("pairs", [1, 40])  # of somas: fewer and more than a vector has lanes
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_derivative_at_zero_is_the_slope(backend: str, pairs: int, batch: int) -> None:
    """PyTorch's convention: u == 0 counts as inactive, in dendrites and in somas."""
    each = range(2 * pairs + 1)
    c = Connectivity.from_csr(each, [0] * 2 * pairs, 2, soma_ptr=each)
    assert not c.is_dense  # which would be a matrix product of torch
    x = torch.zeros(batch, 2, requires_grad=True)
    weight, cable = torch.tensor([[2.0, -3.0], [5.0, 7.0]]).repeat(1, pairs)
    y = dk.functional.dendritic_layer(x, weight, None, cable, None, c, negative_slope=0.25)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(batch, 2 * pairs))
    assert x.grad is not None
    expected = torch.tensor([(2 * 5 - 3 * 7) * 0.25 * 0.25 * pairs, 0.0])
    assert torch.equal(x.grad, expected.expand(batch, 2))


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
