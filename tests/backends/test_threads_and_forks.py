"""Backends under several Python threads and in forked processes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from tests.exact_cases import outputs, whole_numbers
from tests.processes import output


def test_python_threads_do_not_disturb_each_other(backend: str) -> None:
    cases = [whole_numbers(seed) for seed in range(4)]
    with dk.use_backend("reference"):
        expected = [outputs(*case) for case in cases]

    def work(i: int) -> bool:  # threads share connectivities and build their plans at the same time
        return all(
            torch.equal(a, b)
            for k in range(12)
            for j in [(i + k) % len(cases)]
            for a, b in zip(outputs(*cases[j]), expected[j], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4


def test_backward_in_another_thread(backend: str) -> None:
    c, tensors, grad = whole_numbers(1)
    expected = outputs(c, tensors, grad)[1:]
    leaves = [t.clone().requires_grad_() for t in tensors]
    function: Any = dk.functional.dendritic_layer
    y = function(*leaves, c, negative_slope=0.25)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(torch.autograd.grad, y, leaves, grad).result()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


FORK = """
import os, signal, sys, time
import dendrite_kernels as dk, numpy as np, torch
from tests.exact_cases import outputs, whole_numbers
torch.set_num_threads(2)
dk.use_backend(BACKEND)
case = whole_numbers(90)
new = whole_numbers(91)  # only the child computes this one
expected = outputs(*case)
child = os.fork()
if child == 0:
    same = all(np.array_equal(a, b) for a, b in zip(outputs(*case), expected))
    fresh = outputs(*new)
    info = dk.backend_info()[BACKEND]
    os._exit(0 if same and info["threads"] == 1 and fresh[0].isfinite().all() else 3)
end = time.monotonic() + 500
while time.monotonic() < end:
    found, status = os.waitpid(child, os.WNOHANG)
    if found:
        break
    time.sleep(0.02)
else:
    os.kill(child, signal.SIGKILL)
    sys.exit("the child hangs")
assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
assert all(np.array_equal(a, b) for a, b in zip(outputs(*case), expected))  # the parent goes on
assert dk.backend_info()[BACKEND]["threads"] == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", ["cpp", "numba"])
def test_a_forked_child_computes(name: str) -> None:
    """The child has none of the parent's worker threads and must not wait for them."""
    if not dk.backend_info()[name]["available"]:
        pytest.skip(f"backend {name} is unavailable")
    output(f"BACKEND = {name!r}\n{FORK}")
