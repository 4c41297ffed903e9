"""What the benchmarks of single versions time: calls of the package by name.

They use public names only, so that versions from before a change can run them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import dendrite_kernels as dk
from bench.speed.cases import CASES

Run = Callable[[], object]
Backend = Literal["cpp", "numba"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def _layer(case: str) -> tuple[dk.DendriticLayer, Tensor]:
    """A layer with random inputs, constant fan-in, and a batch x [B, N] for it."""
    sizes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    layer = dk.DendriticLayer(sizes.connectivity("constant"))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return layer, torch.rand(sizes.batch, sizes.in_features, generator=generator)


def forward(case: str) -> Run:
    layer, x = _layer(case)

    @torch.no_grad()
    def run() -> Tensor:
        y: Tensor = layer(x)
        return y

    return run


def training(case: str, input_gradient: bool) -> Run:
    """Forward and backward."""
    layer, x = _layer(case)
    x.requires_grad_(input_gradient)
    grad = torch.randn(len(x), CASES[case].somas, generator=torch.Generator().manual_seed(1))

    def run() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)

    return run


def step(case: str) -> Run:
    """A network of the layer and a head: zero_grad, forward, loss, backward, Adam."""
    layer, x = _layer(case)
    model = nn.Sequential(layer, nn.Linear(CASES[case].somas, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    y = torch.arange(len(x)) % 10

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


KINDS: dict[str, Callable[[str], Run]] = {
    "forward": forward,
    "training": lambda case: training(case, input_gradient=False),
    "training with dx": lambda case: training(case, input_gradient=True),
    "step": step,
}
TASKS = tuple(f"{case} {kind}" for case in CASES if case != "W" for kind in KINDS)


def prepare(task: str) -> Run:
    """The call that this task times, after two calls: plans are made, Numba has compiled."""
    case, kind = task.split(" ", 1)
    run = KINDS[kind](case)
    run()
    run()
    return run
