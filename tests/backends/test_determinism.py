"""The same bits again: from call to call, from process to process, for which numbers of threads.

docs/stability.md promises it for one number of threads, and says what else holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from tests.marks import kernels
from tests.networks import draw, draw_grad, gradients, ragged
from tests.processes import output

COUNTS = [1, 2, 3, 4, 8]
BATCHES = [1, 7, 33, 200]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def network(kind: str) -> dk.Connectivity:
    """A new one, whose plan is made for the threads there are. Each has work for eight threads."""
    if kind == "ragged":
        return ragged(120, 900, [0, 0, 1, 200, 200, 555, 900])
    if kind == "fields":
        return dk.connectivity.local_receptive_fields((16, 12), 250, 4, 16, seed=0)
    return dk.connectivity.random(120, 150, 8, 16, seed=0)


def layer(kind: str, batch: int, dtype: torch.dtype, c: dk.Connectivity | None = None) -> Any:
    """y and all gradients, of numbers whose sums depend on their order."""
    torch.manual_seed(0)
    c = network(kind) if c is None else c
    tensors = draw(c, batch, dtype, somas=True)
    grad = draw_grad(batch, c.num_somas, dtype)
    function: Any = dk.functional.dendritic_layer
    return gradients(lambda *leaves: function(*leaves, c), tensors, grad)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


KINDS = pytest.mark.parametrize("kind", ["random", "ragged", "fields"])


@pytest.mark.slow
@KINDS
@kernels
def test_a_call_gives_the_same_bits_again(backend: str, kind: str) -> None:
    for count in COUNTS:
        torch.set_num_threads(count)
        for batch in BATCHES:
            for dtype in (torch.float32, torch.float64):
                first = layer(kind, batch, dtype)
                assert all(equal(layer(kind, batch, dtype), first) for _ in range(3))


@KINDS
@kernels
def test_forward_gives_the_same_bits_for_all_numbers_of_threads(backend: str, kind: str) -> None:
    for batch in BATCHES:
        for dtype in (torch.float32, torch.float64):
            found = []
            for count in COUNTS:
                torch.set_num_threads(count)
                found.append(layer(kind, batch, dtype)[0])
            assert all(y.equal(found[0]) for y in found), (batch, dtype)


DIGESTS = """
import torch
from tests.backends import test_determinism as t
torch.set_num_threads(3)
print(t.digest(BACKEND))
"""


def digest(backend: Any) -> str:
    """Of all results."""
    found = hashlib.sha256()
    with dk.use_backend(backend):
        for kind in ("random", "ragged", "fields"):
            for result in layer(kind, 200, torch.float32):
                found.update(result.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
@kernels
def test_another_process_gives_the_same_bits(backend: str) -> None:
    torch.set_num_threads(3)
    script = f"BACKEND = {backend!r}\n{DIGESTS}"
    assert output(script, PYTHONHASHSEED="1").strip() == digest(backend)
