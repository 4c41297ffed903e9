"""All that the benchmarks know of our kernels: their launches, plans, and a model of their time.

A call of the backend is recorded once, with any plan that the planner might choose; then its single
launches are repeated alone, on whichever stream is current.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dendrite_kernels as dk
from bench.gpu.clock import graph_milliseconds
from dendrite_kernels.backends import cuda
from dendrite_kernels.backends.cuda import plan as planner
from dendrite_kernels.backends.cuda.plan import Limits, TilePlan, Work
from dendrite_kernels.backends.protocol import Operands

# The functions of the extension that launch kernels; the last argument is the stream.
LAUNCHES = (
    *("make_tiles", "pack_weight", "forward", "backward_weight", "finish_weight"),
    "backward_input",
)
KERNELS = {  # and the function of the planner that decides
    "forward": "plan_tiles",
    "backward_weight": "plan_weight",
    "backward_input": "plan_tiles",
}
WARPS, ROUNDS, SPLITS = (4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)
Launch = tuple[str, Callable[[], object]]


class Problem:
    """A layer's kernels without autograd, with the operands of a batch."""

    def __init__(self, layer: dk.DendriticLayer, x: Tensor, grad: Tensor) -> None:
        weight, dendrite_bias, cable, soma_bias = (p.detach() for p in layer.parameters())
        slope = layer.negative_slope
        self.x, self.grad = x, grad.to(x.dtype)
        self.operands = Operands(
            weight, dendrite_bias, cable, soma_bias, layer.connectivity, slope, slope
        )
        self.y, self.signs = cuda.forward(x, self.operands, True, False)

    def call(self, kernel: str) -> Tensor:
        """A call of the backend that runs the kernel last; the result that the kernel computes."""
        if kernel == "forward":
            return cuda.forward(self.x, self.operands, True, False)[0]
        found = cuda.backward(
            self.grad, self.x, self.y, self.signs, self.operands, kernel == "backward_input"
        )
        return found[0 if kernel == "backward_input" else 1]

    def work(self, kernel: str) -> tuple[Work, Limits, TilePlan]:
        """What the planner is asked for this kernel, and its answer."""
        asked: list[tuple[Work, Limits, TilePlan]] = []
        decide = getattr(planner, KERNELS[kernel])

        def listen(work: Work, limits: Limits) -> TilePlan:
            asked.append((work, limits, decide(work, limits)))
            return asked[-1][2]

        with _replaced(planner, KERNELS[kernel], listen):
            self.call(kernel)
        return asked[-1]

    def launches(self, kernel: str, plan: TilePlan | None = None) -> tuple[list[Launch], Tensor]:
        """The launches that a call needs for this kernel, and their result."""
        recorder = _Recorder(cuda._load()[0])
        decide = getattr(planner, KERNELS[kernel]) if plan is None else lambda *_: plan
        with (
            _replaced(cuda, "_load", lambda: (recorder, None)),
            _replaced(planner, KERNELS[kernel], decide),
        ):
            result = self.call(kernel)
        found = recorder.launches
        if kernel == "backward_input":  # the call computed the gradients of parameters before
            first = 1 + [name for name, _ in found].index("finish_weight")
            found = found[first:]
        return found, result


class _Recorder:
    """The extension, but its launches can be repeated."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension
        self.launches: list[Launch] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._extension, name)
        if name not in LAUNCHES:
            return found

        def launch(*arguments: Any) -> None:
            def again() -> None:
                stream = torch.cuda.current_stream().cuda_stream
                found(*arguments[:-1], stream)

            again()
            self.launches.append((name, again))

        return launch


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    was = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, was)


def kernel_times(layer: dk.DendriticLayer, x: Tensor, grad: Tensor) -> dict[str, dict[str, float]]:
    """Every launch of forward and backward by itself, in a graph of many."""
    problem = Problem(layer, x, grad)
    found = {}
    for kernel in KERNELS:
        launches, _ = problem.launches(kernel)
        for name, run in launches:
            title = name if name == kernel else f"{kernel}: {name}"
            while title in found:
                title += " again"
            found[title] = graph_milliseconds(run)
    return found


def candidates(kernel: str, work: Work, limits: Limits) -> list[TilePlan]:
    """Every legal kind of tile, with all parts, threads and partial sums worth a try."""
    found = []
    for kind, shared, staged in planner.tiles_that_fit(work, limits):
        tiles = -(-work.batch // kind.samples)
        splits = [n for n in SPLITS if n <= tiles] if kernel == "backward_weight" else [0]
        for groups in splits:
            for warps in WARPS:
                most = max(1, -(-work.outputs // warps))
                for rounds in ROUNDS:
                    parts = rounds * limits.multiprocessors // (groups or tiles)
                    parts = min(max(1, parts), most)
                    found.append(TilePlan(kind, tiles, parts, groups, 32 * warps, shared, staged))
    return list(dict.fromkeys(found))


# The terms of the planner's model and what it takes each to cost, in cycles.
TODAY = {
    "launch": None, "instruction": 1 / planner.ISSUE, "wavefront": 1.0,
    "byte from L2": 1 / planner.L2_BYTES, "staged byte": 1 / planner.L2_BYTES,
}  # fmt: skip


def amounts(kernel: str, work: Work, limits: Limits, plan: TilePlan) -> list[float]:
    """How often a multiprocessor pays for each term of TODAY."""
    turns = -(-plan.blocks // limits.multiprocessors)
    if plan.tile_groups:
        turns *= -(-plan.tiles // plan.tile_groups)
    demands = planner.demands(plan, work, planner.COSTS[kernel])
    return [1, *(turns * amount for amount in (*demands, plan.shared_bytes))]
