"""Reductions over the dendrites of a soma, and k winners, beside loops in Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels import Connectivity
from tests.networks import NETWORKS

NAMES = ["constant fan-in", "ragged", "D=1", "S=1", "no synapse"]
OPS: list[Any] = ["sum", "max", "absmax"]


def loop(u: Tensor, c: Connectivity, op: str) -> tuple[Tensor, Tensor]:
    """u [B, R] -> values and winners [B, S], number by number."""
    pointer = c.soma_ptr.tolist()
    values = torch.zeros(len(u), c.num_somas, dtype=u.dtype)
    winners = torch.full(values.shape, -1)
    for b, row in enumerate(u.tolist()):
        for s in range(c.num_somas):
            best = None
            for r in range(pointer[s], pointer[s + 1]):
                if op == "sum":
                    values[b, s] += row[r]
                    continue
                rank = abs(row[r]) if op == "absmax" else row[r]
                rank = math.inf if math.isnan(row[r]) else rank
                if best is None or rank > best:
                    best, values[b, s], winners[b, s] = rank, row[r], r
    return values, winners


def drawn(c: Connectivity, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small integers: many are equal, and every dtype has them."""
    return torch.randint(-4, 5, (*shape, c.num_dendrites)).to(dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_a_loop(name: str, op: Any, dtype: torch.dtype) -> None:
    c = NETWORKS[name]()
    u = drawn(c, 50, dtype=dtype)
    values, winner = dk.functional.soma_reduce(u, c, op)
    expected, winners = loop(u.double(), c, op)
    assert values.dtype == dtype
    assert winner.dtype == torch.int32
    assert torch.equal(values.double(), expected)
    assert torch.equal(winner.long(), winners)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["constant fan-in", "ragged"])
def test_the_gradient_goes_to_the_winner(name: str, op: Any) -> None:
    c = NETWORKS[name]()
    u = drawn(c, 20).requires_grad_()
    values, winner = dk.functional.soma_reduce(u, c, op)
    assert not winner.requires_grad
    grad = torch.randn_like(values)
    (found,) = torch.autograd.grad(values, u, grad)
    expected = torch.zeros_like(found)
    owner = torch.repeat_interleave(c.soma_ptr.long().diff())
    for b in range(20):
        for r in range(c.num_dendrites):
            s = owner[r]
            if op == "sum" or winner[b, s] == r:
                expected[b, r] = grad[b, s]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["constant fan-in", "ragged"])
def test_shapes_and_strides(name: str, op: Any) -> None:
    c = NETWORKS[name]()
    u = drawn(c, 2, 3, 4)
    values, winner = dk.functional.soma_reduce(u, c, op)
    assert values.shape == winner.shape == (2, 3, 4, c.num_somas)
    for found, expected in [
        (dk.functional.soma_reduce(u[1, 2, 3], c, op), (values[1, 2, 3], winner[1, 2, 3])),
        (
            dk.functional.soma_reduce(u[:, 0].mT.contiguous().mT, c, op),
            (values[:, 0], winner[:, 0]),
        ),
        (dk.functional.soma_reduce(u[:0], c, op), (values[:0], winner[:0])),
    ]:
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["constant fan-in", "ragged"])
def test_not_a_number_wins_and_stays_in_its_soma(name: str) -> None:
    c = NETWORKS[name]()
    u = drawn(c, 3)
    soma = c.num_somas - 2
    first, end = c.soma_ptr[soma : soma + 2].tolist()
    u[1, [first + 1, end - 1]] = torch.nan
    u[2, first:end] = -torch.inf
    for op in ("max", "absmax"):
        values, winner = dk.functional.soma_reduce(u, c, op)
        assert values.isnan().nonzero().tolist() == [[1, soma]]
        assert winner[1, soma] == first + 1
        assert values[2, soma] == -torch.inf
        assert winner[2, soma] == first
    values, _ = dk.functional.soma_reduce(u, c, "sum")
    assert values.isnan().nonzero().tolist() == [[1, soma]]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["constant fan-in", "ragged"])
def test_derivatives_and_transforms(name: str, op: Any) -> None:
    c = NETWORKS[name]()
    u = torch.randn(4, c.num_dendrites, dtype=torch.float64, requires_grad=True)

    def values(u: Tensor) -> Tensor:
        return dk.functional.soma_reduce(u, c, op)[0]

    assert torch.autograd.gradcheck(values, u, fast_mode=True)
    assert torch.autograd.gradgradcheck(values, u, fast_mode=True)
    expected, winner = dk.functional.soma_reduce(u.detach(), c, op)
    mapped = torch.func.vmap(lambda u: dk.functional.soma_reduce(u, c, op))(u.detach())
    _, tangent = torch.func.jvp(values, (u.detach(),), (u.detach(),))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda u: dk.functional.soma_reduce(u, c, op), backend="aot_eager", fullgraph=True
    )(u.detach())
    for found in (mapped, (tangent, winner), compiled):
        torch.testing.assert_close(found[0], expected)
        assert torch.equal(found[1], winner)


def test_sums_of_low_precision_are_rounded_once() -> None:
    for c in (NETWORKS["S=1"](), Connectivity.from_csr([0] * 302, [], 2, soma_ptr=[0, 1, 301])):
        u = torch.ones(2, c.num_dendrites, dtype=torch.bfloat16)
        u[:, 1:] = 2**-8  # alone each would be lost beside 1
        values, _ = dk.functional.soma_reduce(u, c, "sum")
        assert torch.equal(values, dk.functional.soma_reduce(u.float(), c, "sum")[0].bfloat16())


def test_errors() -> None:
    c = NETWORKS["constant fan-in"]()
    for arguments, message in [
        ((torch.ones(2, 47), c, "max"), r"Expected u of shape \[..., 48\], got \[2, 47\]"),
        ((torch.tensor(1.0), c, "max"), r"Expected u of shape \[..., 48\], got \[\]"),
        ((torch.ones(2, 48), c, "min"), "Expected op of .*, got 'min'"),
        ((torch.ones(2, 48).int(), c, "max"), "Expected u of dtype .*, got torch.int32"),
        (([1.0], c, "max"), "Expected u to be a torch.Tensor, got list"),
        ((torch.ones(2, 48), 3, "max"), "Expected a Connectivity, got int"),
    ]:
        anything: Any = arguments
        with pytest.raises((TypeError, ValueError), match=message):
            dk.functional.soma_reduce(*anything)


# ---- k winners ----


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_k_winners(k: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 12).to(dtype).requires_grad_()
    y = dk.functional.k_winners(x, k)
    assert y.dtype == dtype
    stays = torch.zeros(x.shape, dtype=torch.bool)
    for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
        order = sorted(range(12), key=lambda n: -x[i, j, n].item())
        stays[i, j, order[:k]] = True
    assert torch.equal(y, x * stays)
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad * stays)


def test_exactly_k_stay_of_equal_ones() -> None:
    x = torch.ones(5, 40)
    assert (dk.functional.k_winners(x, 7) == 1).sum(1).tolist() == [7] * 5
    assert dk.functional.k_winners(-x, 7).sum(1).tolist() == [-7] * 5  # negative ones may win
    x[:, 3] = torch.nan
    y = dk.functional.k_winners(x, 2)
    assert y[:, 3].isnan().all()
    assert torch.equal(y.nan_to_num(0).sum(1), torch.ones(5))
    x[:, 3] = torch.inf
    assert dk.functional.k_winners(-x, 2).isfinite().all()
    assert dk.functional.k_winners(x[:0], 2).shape == (0, 40)


def test_k_winners_differentiates_and_compiles() -> None:
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def three(x: Tensor) -> Tensor:
        return dk.functional.k_winners(x, 3)

    assert torch.autograd.gradcheck(three, x)
    assert torch.autograd.gradgradcheck(three, x)
    torch._dynamo.reset()
    expected = three(x)
    assert torch.equal(torch.compile(three, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.func.vmap(three)(x), expected)


def test_errors_of_k_winners() -> None:
    for arguments, message in [
        ((torch.ones(2, 4), 5), r"Expected x of shape \[..., 5 or more\], got \[2, 4\]"),
        ((torch.ones(2, 4), 0), "Expected k from 1 to"),
        ((torch.ones(2, 4), 1.5), "Expected k to be an integer, got 1.5"),
        ((torch.tensor(1.0), 1), r"Expected x of shape \[..., 1 or more\], got \[\]"),
        (([1.0], 1), "Expected x to be a torch.Tensor, got list"),
    ]:
        anything: Any = arguments
        with pytest.raises((TypeError, ValueError), match=message):
            dk.functional.k_winners(*anything)
