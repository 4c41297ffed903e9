"""Random shapes, layouts and mistakes: right answers are exact, wrong calls raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from dendrite_kernels import Connectivity, connectivity
from tests.functional.test_errors import BAD_TENSORS, Change, function
from tests.processes import output


def whole(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers: with a slope of a power of two every sum is exact in any order."""
    return torch.from_numpy(rng.integers(-3, 4, shape)).to(dtype)


def any_network(rng: np.random.Generator) -> Connectivity:
    """Rows of 0 to all inputs, somas of 0 to all dendrites."""
    inputs, rows = int(rng.integers(1, 70)), int(rng.choice([1, 2, 7, 16, 33, 90]))
    density = rng.choice([0.0, 0.02, 0.2, 1.0], p=[0.05, 0.25, 0.6, 0.1])
    mask = rng.random((rows, inputs)) < density
    if rng.random() < 0.3:  # constant fan-in, some of it of the sizes with kernels of their own
        k = int(rng.choice([k for k in (1, 3, 8, 16, 32, 48) if k <= inputs]))
        return connectivity.random(inputs, rows, 1, k, constant_fan_in=True, seed=rng)
    cuts = np.sort(rng.integers(0, rows + 1, rng.integers(0, 9)))
    return Connectivity.from_mask(mask, soma_ptr=[0, *cuts, rows])


def laid_out(rng: np.random.Generator, t: Tensor) -> Tensor:
    """The same values under other strides."""
    kind = rng.integers(5)
    if kind == 1 and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:  # every other number of a row
        return torch.stack([t, t + torch.nan], -1)[..., 0]
    if kind == 3:  # at an odd address
        padded = torch.full((t.numel() + 3,), torch.nan, dtype=t.dtype)
        padded[3:] = t.flatten()
        return padded[3:].reshape(t.shape)
    if kind == 4 and t.dim() > 1:  # backwards, with a gap
        return t.flip(0).repeat(2, *[1] * (t.dim() - 1))[: t.shape[0]].flip(0)
    return t


MISTAKES: list[Change] = [
    *list(BAD_TENSORS.values())[:12],
    lambda t: t.numpy(),
    lambda t: t[..., None],
    lambda t: t.bool(),
]


def any_case(rng: np.random.Generator) -> tuple[bool, dict[str, Any], Tensor]:
    """Good arguments of a function (of the dendritic layer?) and an incoming gradient."""
    somas = bool(rng.random() < 0.7)
    c = any_network(rng)
    dtype = [torch.float32, torch.float64][rng.integers(2)]
    batch = int(rng.choice([0, 1, 2, 5, 15, 16, 31, 32, 33, 64, 65, 100]))
    lead = [(batch,), (2, batch), (batch, 1), ()][rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])]
    sizes = {"weight": c.nnz, "bias": c.num_dendrites}
    if somas:
        sizes = {
            "synapse_weight": c.nnz, "dendrite_bias": c.num_dendrites,
            "cable_weight": c.num_dendrites, "soma_bias": c.num_somas,
        }  # fmt: skip
    call: dict[str, Any] = {"x": whole(rng, *lead, c.in_features, dtype=dtype)}
    call |= {name: whole(rng, size, dtype=dtype) for name, size in sizes.items()}
    call = {name: laid_out(rng, t).requires_grad_(rng.random() < 0.8) for name, t in call.items()}
    for name in sizes:
        if name.endswith("bias") and rng.random() < 0.2:
            call[name] = None
    if somas:
        call["negative_slope"] = float(rng.choice([0, 0.25, 0.5, 1, 2]))
        names = ["leaky_relu", "relu", "identity"]
        call["activation"] = str(rng.choice(names, p=[0.8, 0.1, 0.1]))
        call["soma_activation"] = str(rng.choice(names)) if rng.random() < 0.5 else None
    outputs = c.num_somas if somas else c.num_dendrites
    grad = laid_out(rng, whole(rng, *lead, outputs, dtype=dtype))
    return somas, {**call, "connectivity": c}, grad


def leaves(call: dict[str, Any]) -> list[Tensor]:
    return [t for t in call.values() if isinstance(t, Tensor) and t.requires_grad]


def results(run: Callable[..., Tensor], call: dict[str, Any], grad: Tensor) -> list[Tensor]:
    y = run(**call)
    found = torch.autograd.grad(y, leaves(call), grad, allow_unused=True) if leaves(call) else ()
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in found)]


def fuzz(seed: int, cases: int) -> None:
    """Good calls equal the oracle exactly; the same calls with one mistake raise."""
    rng = np.random.default_rng(seed)
    for i in range(cases):
        somas, call, grad = any_case(rng)
        oracle = dk.reference.dendritic_layer if somas else dk.reference.sparse_linear
        ours, expected = (results(run, call, grad) for run in (function(somas), oracle))
        for k, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert a.dtype == b.dtype, (seed, i, k)
            assert torch.equal(a, b), (seed, i, k, call)
        tensors = [(name, t.detach()) for name, t in call.items() if isinstance(t, Tensor)]
        name, good = tensors[rng.integers(len(tensors))]
        bad = MISTAKES[rng.integers(len(MISTAKES))](good) if good.numel() else good[..., None]
        if is_a_mistake(name, good, bad):
            with pytest.raises((ValueError, TypeError), match=r"Expected .* got"):
                function(somas)(**{**call, name: bad})


def is_a_mistake(name: str, good: Tensor, bad: Any) -> bool:
    """Not float64 made float64, nor another batch."""
    if not isinstance(bad, Tensor) or bad.dtype != good.dtype or bad.device != good.device:
        return True
    return bad.shape[-1:] != good.shape[-1:] if name == "x" else bad.shape != good.shape


@pytest.mark.parametrize("backend", ["cpp", "numba"], indirect=True)  # compared with "reference"
@pytest.mark.parametrize("seed", range(4))
def test_fuzz(backend: str, seed: int) -> None:
    fuzz(seed, 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpp", "numba"])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_fuzz_does_not_crash(name: str, threads: int) -> None:
    """In a process of its own, with freed memory overwritten by the allocator."""
    if not dk.backend_info()[name]["available"]:
        pytest.skip(f"backend {name} is unavailable")
    output(
        f"""
import torch, dendrite_kernels as dk
from tests.functional import test_fuzz
torch.set_num_threads({threads})
dk.use_backend({name!r})
for seed in range(100, 120):
    test_fuzz.fuzz(seed, 150)
""",
        MALLOC_PERTURB_="165",
    )
