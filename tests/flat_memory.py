"""Work that is repeated many times must not gather memory.

    python -m tests.flat_memory [--repeats 10000] [--backend cpp]

Each kind of work runs in a process of its own. After the first two tenths of the repeats, in which
caches, pools and the allocator fill, the resident memory may grow by MOST. What leaks one object of
Python in each repetition leaks 56 bytes and more: 0.4 MiB in 8,000. What leaks an array of the
small layer here leaks several MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dendrite_kernels as dk
from dendrite_kernels import optim, plasticity

MOST = 2.0  # MiB: the allocator's pages, a few hundred KiB from run to run
N, SOMAS, BATCH = 64, 16, 40
Work = Callable[[int], None]


def network(seed: int = 0, dendrites: int = 4) -> dk.Connectivity:
    return dk.connectivity.random(N, SOMAS, dendrites, 8, constant_fan_in=True, seed=seed)


def adam(layer: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(layer.parameters(), 1e-3)


def differentiate(layer: torch.nn.Module, x: torch.Tensor) -> None:
    layer.zero_grad()
    layer(x).square().mean().backward()


def training() -> Work:
    layer, x = dk.DendriticLayer(network()), torch.randn(BATCH, N)
    optimizer = adam(layer)

    def work(_: int) -> None:
        differentiate(layer, x)
        optimizer.step()

    return work


def training_in_backward() -> Work:
    """A trainer for each ten steps: parameters are given back."""
    layer, x = dk.DendriticLayer(network()), torch.randn(BATCH, N)

    def work(_: int) -> None:
        trainer = optim.StepInBackward(layer.parameters(), lambda p: torch.optim.Adam(p, 1e-3))
        layer(x).square().mean().backward()
        trainer.remove()

    return work


def connectivities() -> Work:
    """Made, used forward and backward, with and without the gradient of x, and dropped."""
    x = torch.randn(BATCH, N)

    def work(i: int) -> None:
        layer = dk.DendriticLayer(network(i))
        differentiate(layer, x.clone().requires_grad_())
        differentiate(layer, x)

    return work


def rewirings() -> Work:
    layer, x = dk.DendriticLayer(network()), torch.randn(BATCH, N)
    optimizer, generator = adam(layer), torch.Generator().manual_seed(0)

    def work(_: int) -> None:
        differentiate(layer, x)
        optimizer.step()
        plasticity.rewire(layer, optimizer, fraction=0.3, generator=generator)

    return work


def growths() -> Work:
    """A layer that grows is dropped after eight times."""
    x, new = torch.randn(BATCH, N), network(1, 1)
    kept: list[Any] = []

    def work(i: int) -> None:
        if i % 8 == 0:
            layer = dk.DendriticLayer(network())
            kept[:] = layer, adam(layer)
        differentiate(kept[0], x)
        kept[1].step()
        plasticity.grow(*kept, new)

    return work


def state_dicts() -> Work:
    layer, x = dk.DendriticLayer(network()), torch.randn(BATCH, N)

    def work(_: int) -> None:
        differentiate(layer, x)
        layer.load_state_dict(layer.state_dict())
        dk.DendriticLayer.from_state_dict(layer.state_dict())

    return work


def errors() -> Work:
    """Calls that are refused, in forward and in backward."""
    layer, x = dk.DendriticLayer(network()), torch.randn(BATCH, N)

    def fail(_: torch.Tensor) -> None:
        raise ValueError("Expected no gradient, got one")

    def work(_: int) -> None:
        with contextlib.suppress(ValueError):
            layer(x[:, 1:])
        y = layer(x)
        y.register_hook(fail)
        with contextlib.suppress(ValueError):
            y.sum().backward()

    return work


KINDS: dict[str, tuple[Callable[[], Work], float]] = {  # and the share of the repeats
    "steps of training": (training, 1),
    "steps in backward": (training_in_backward, 0.5),
    "connectivities": (connectivities, 1),
    "rewirings": (rewirings, 1),
    "growths": (growths, 0.2),
    "state dicts there and back": (state_dicts, 0.2),
    "calls that fail": (errors, 1),
}


def resident() -> float:
    """MiB of this process."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def sizes(kind: str, repeats: int, backend: Any) -> list[float]:
    """MiB after each tenth of the repeats."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dk.use_backend(backend)
    make, share = KINDS[kind]
    work, found = make(), []
    tenth = int(repeats * share) // 10
    for first in range(0, 10 * tenth, tenth):
        for i in range(first, first + tenth):
            work(i)
        gc.collect()
        found.append(resident())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10_000)
    parser.add_argument("--backend", choices=["cpp", "numba", "reference"], default="cpp")
    parser.add_argument("--only", choices=KINDS, nargs="*", default=list(KINDS))
    options = parser.parse_args()
    os.environ["MALLOC_ARENA_MAX"] = "1"
    print("| work | times | MiB after 20 % | at the end | grown by |\n|---|---|---|---|---|")
    grown = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for kind in options.only:
            found = pool.apply(sizes, (kind, options.repeats, options.backend))
            times = int(options.repeats * KINDS[kind][1]) // 10 * 10
            grown.append(found[-1] - found[1])
            print(f"| {kind} | {times:,} | {found[1]:.1f} | {found[-1]:.1f} | {grown[-1]:.2f} |")
    if max(grown) > MOST:
        raise SystemExit(f"Expected growth of at most {MOST} MiB, got {max(grown):.2f}")


if __name__ == "__main__":
    main()
