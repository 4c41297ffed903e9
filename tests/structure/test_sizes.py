"""Sizes past 2**31, which int32 cannot number: an error before any memory, or a right result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dendrite_kernels import Connectivity, _pattern, transposed
from dendrite_kernels.backends import cpp
from dendrite_kernels.backends.protocol import Operands
from tests.marks import needs_cpp
from tests.networks import ragged
from tests.nn.test_hostile_files import little_memory


def claimed(size: int, dtype: Any = np.int32) -> Any:
    """An array of so many zeros in the memory of one."""
    return np.broadcast_to(np.zeros(1, dtype), size)


MANY: dict[str, Any] = {
    "synapses": lambda: Connectivity([0, 2**31], claimed(2**31), [0, 1], 4),
    "synapses of uint16": lambda: Connectivity([0, 2**31], claimed(2**31, np.uint16), [0, 1], 4),
    "synapses in a tensor": lambda: Connectivity(
        [0, 2**31], torch.zeros(1, dtype=torch.int64).expand(2**31), [0, 1], 4
    ),
    "synapses past 2**32": lambda: Connectivity([0, 2**32], claimed(2**32), [0, 1], 4),
    "dendrites": lambda: Connectivity(claimed(2**31 + 1), [], [0, 2**31], 4),
    "dendrites without somas": lambda: Connectivity.from_csr(claimed(2**31 + 1), [], 4),
    "somas": lambda: Connectivity([0, 1], [0], claimed(2**31 + 1), 4),
    "inputs side by side": lambda: Connectivity.block_diagonal([wide(), wide()]),
}  # fmt: skip


def wide() -> Connectivity:
    return Connectivity.from_csr([0, 1], [2**30 - 1], 2**30)


@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
def test_more_than_int32_can_number(make: Any) -> None:
    with little_memory(), pytest.raises(ValueError, match="Expected"):
        make()


def test_products_that_wrap_are_no_image() -> None:
    shape, inputs = (4106, 2142253537, 2**21), 714 * 2**21
    assert math.prod(shape) == 2**64 + inputs
    with pytest.raises(ValueError, match="Expected in_shape"):
        Connectivity.from_csr([0, 0], [], inputs, in_shape=shape)


def test_masks_of_too_many_synapses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pattern, "SIZE_LIMIT", 12)
    assert Connectivity.from_mask(np.ones((1, 11), bool)).nnz == 11
    with pytest.raises(ValueError, match=r"Expected fewer than 2\*\*31 synapses, got 12"):
        Connectivity.from_mask(np.ones((4, 3), bool))


def test_slots_of_the_plan_fit_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pads are left out where they would not."""
    c = ragged(7, 400, [0, 400])
    crow = c.crow_indices.numpy()
    padded = transposed.build_transposed_plan(crow, c.columns, 400)
    assert padded.group == 4
    assert padded.slot.max() >= c.nnz
    monkeypatch.setattr(transposed, "SIZE_LIMIT", c.nnz + 1)
    plan = transposed.build_transposed_plan(crow, c.columns, 400)
    assert plan.group == 1
    assert plan.slot.max() < c.nnz


def free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 0


@needs_cpp
@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/meminfo").exists() or free_memory() < 7 << 30, reason="needs 7 GiB of memory"
)
def test_more_than_2_31_outputs() -> None:
    """B * R = 2**31 + 2**17, in bfloat16: samples repeat, and so must all results.

    Numbers are -1, 0 and 1, so that sums over all samples stay below 2**24 and are exact.
    """
    rows, period = 16, 1 << 13
    c = Connectivity.from_csr(range(rows + 1), [i % 2 for i in range(rows)], 2, [0, 7, rows])
    times = 2**31 // rows // period + 1

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape)

    few, grad_few = draw(period, 2).bfloat16(), draw(period, rows).bfloat16()
    operands = Operands(draw(rows).float(), draw(rows).float(), None, None, c, 1.0, 1.0)
    x = few.repeat(times, 1)
    y, signs = cpp.forward(x, operands, True, False)
    y_few, signs_few = cpp.forward(few, operands, True, False)
    assert y.numel() > 2**31
    assert_repeats(y, y_few)
    assert_repeats(signs, signs_few)

    grad = y.view(-1, period, rows).copy_(grad_few).view(-1, rows)  # in the memory of y
    dx, *many = cpp.backward(grad, x, None, None, operands, need_x=True)
    dx_few, *once = cpp.backward(grad_few, few, None, None, operands, need_x=True)
    assert_repeats(dx, dx_few)
    for one, all_ in zip(once[:2], many[:2], strict=True):
        assert 0 < one.abs().max() * times < 2**24
        assert torch.equal(all_, one * times)


def assert_repeats(many: torch.Tensor, few: torch.Tensor) -> None:
    for part in many.view(-1, *few.shape).split(1 << 10):
        assert bool((part == few).all())
