"""Whether the backends compute right here, in up to a minute."""

from __future__ import annotations

import time

import torch

import dendrite_kernels as dk

from .backends import BackendName
from .benchmark.problem import TOLERANCES

BATCH = 70  # whole and partial tiles of every width


def _networks() -> dict[str, dk.Connectivity]:
    draw = dk.connectivity
    return {
        "variable fan-in": draw.random(784, 32, 16, 16, seed=0),
        "constant fan-in": draw.random(784, 32, 16, 16, constant_fan_in=True, seed=0),
        "receptive fields": draw.local_receptive_fields((28, 28), 32, 4, 9, seed=0),
        "70000 inputs": draw.random(70_000, 4, 2, 16, constant_fan_in=True, seed=0),
    }


def _results(layer: dk.DendriticLayer, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def _worst_error(connectivity: dk.Connectivity, dtype: torch.dtype, name: BackendName) -> float:
    """Largest relative L2 error of the output and all gradients against the float64 reference."""
    layer = dk.DendriticLayer(connectivity, dtype=dtype)
    x = torch.randn(BATCH, connectivity.in_features, dtype=dtype)
    grad = torch.randn(BATCH, connectivity.num_somas, dtype=dtype) + 1
    with dk.use_backend(name):
        actual = _results(layer, x, grad)
    with dk.use_backend("reference"):
        exact = _results(layer.double(), x.double(), grad.double())
    errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, exact, strict=True)]
    return max(errors)


def check() -> int:
    """Print each backend's errors against float64; the number of those that are too large."""
    failures = 0
    torch.manual_seed(0)
    names: tuple[BackendName, ...] = "cpp", "numba"
    for name in names:
        if not dk.backend_info()[name]["available"]:
            continue
        started = time.perf_counter()
        for title, connectivity in _networks().items():
            for dtype, tolerance in TOLERANCES.items():
                worst = _worst_error(connectivity, dtype, name)
                correct = worst <= tolerance
                failures += not correct
                verdict = "ok" if correct else f"WRONG, expected at most {tolerance:.0e}"
                print(f"{name}: {title}, {dtype}: relative error {worst:.1e} {verdict}")
        print(f"{name}: checked in {time.perf_counter() - started:.1f} s")
    print("All checks passed" if failures == 0 else f"{failures} checks FAILED")
    return failures
