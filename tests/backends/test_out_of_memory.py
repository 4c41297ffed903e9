"""Memory that runs out in the middle of a call: an error, and the next call is right."""

from __future__ import annotations

import sys

import pytest

import dendrite_kernels as dk
from tests.processes import output

# The limit is what the process has now, and a little more in each round: so each allocation of the
# call fails in turn, in torch and in the workspaces of kernels.
SCRIPT = """
import resource, torch, dendrite_kernels as dk
from pathlib import Path
dk.use_backend(BACKEND)
torch.set_num_threads(1)
layer = dk.DendriticLayer(dk.connectivity.random(20_000, 300, 4, 64, seed=0))
held = [bytearray(60_000) for _ in range(1000)]  # what the heap has free: the rest takes new pages
x = torch.randn(320, 20_000, requires_grad=True)
wants = [x, *layer.parameters()]

def mapped():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def call():
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.sum(), wants)]

def attempt(extra):
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + extra, resource.RLIM_INFINITY))
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        failed.add("MemoryError" if isinstance(error, MemoryError) else str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

def same(a, b):
    return all(p.equal(q) for p, q in zip(a, b, strict=True))

small = torch.randn(1, 20_000, requires_grad=True)
torch.autograd.grad(layer(small).sum(), small)  # all is imported and planned
if BACKEND == "numba":  # LLVM ends a process where it finds no memory for its code
    call()
    dk.backends.numba._scratch.kept = None
failed, extras = set(), range(0, 96 << 20, 4 << 20)
first = next(filter(None, map(attempt, extras)))  # there are no workspaces before
expected = call()
assert same(first, expected)
for extra in extras:
    attempt(extra)
    assert same(call(), expected), extra
print(*failed, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
@pytest.mark.parametrize("name", ["cpp", "numba"])
def test_the_next_call_is_right(name: str) -> None:
    if not dk.backend_info()[name]["available"]:
        pytest.skip(f"backend {name} is unavailable")
    printed = output(f"BACKEND = {name!r}\n{SCRIPT}", MALLOC_MMAP_THRESHOLD_="65536")
    assert "DefaultCPUAllocator" in printed  # of torch
    assert name == "cpp" or "MemoryError" in printed  # of the memory in which Numba's kernels work
