"""Samples of 16 bits: widened exactly and rounded as torch does, on every path of a kernel."""

from __future__ import annotations

import pytest
import torch

import dendrite_kernels as dk

LOW = [torch.bfloat16, torch.float16]
# Whole vectors and the columns behind them, in tiles and in a single sample.
every_path = pytest.mark.parametrize("outputs", [7, 64, 1 << 16])


def pairs(outputs: int) -> dk.Connectivity:
    """Each dendrite sees two inputs of its own."""
    crow = torch.arange(0, 2 * outputs + 1, 2)
    return dk.Connectivity.from_csr(crow, torch.arange(2 * outputs), 2 * outputs)


@every_path
@pytest.mark.parametrize("low", LOW, ids=str)
def test_sums_of_all_numbers_are_those_of_torch(
    backend: str, low: torch.dtype, outputs: int
) -> None:
    """Subnormal numbers, ties, infinities and NaN among them."""
    c, batch = pairs(outputs), -(-(1 << 16) // outputs)
    first = torch.arange(batch * outputs)
    second = first[torch.randperm(first.numel())]
    a, b = (number.to(torch.int16).view(low).view(batch, outputs) for number in (first, second))
    x = torch.stack([a, b], -1).flatten(1)
    u = dk.functional.sparse_linear(x, torch.ones(c.nnz, dtype=low), None, c)
    expected = (a.float() + b.float()).to(low)
    torch.testing.assert_close(u, expected, rtol=0, atol=0, equal_nan=True)


@every_path
def test_no_nan_is_rounded_to_a_number(backend: str, outputs: int) -> None:
    """Its bits alone would carry over: the first to infinity, the second to a zero."""
    c = dk.connectivity.one_to_one(outputs, outputs, 1)
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x = nan.repeat(outputs)[:outputs].repeat(1 if outputs == 1 << 16 else 3, 1)
    u = dk.functional.sparse_linear(x, torch.ones(outputs), None, c, precision="bf16")
    assert u.isnan().all()
