"""What is compared: a way to compute the layer of a `Problem`, and to train it.

A peer's parameters have the layout that suits it best (a matrix, padded rows); `results` hands its
gradients back synapse by synapse for verification.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .oracle import PARAMETERS
from .problem import Problem

MODES = ("forward", "training", "training with dx")


class Peer:
    """Forward without gradients, and forward + backward with and without the input's gradient."""

    modes: tuple[str, ...] = MODES
    device: str | None = None  # the only kind it runs on

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x = problem.x.clone().requires_grad_()
        self.leaves = self.make_leaves()

    @staticmethod
    def bytes_needed(problem: Problem) -> int:
        """What building and running it takes beyond the problem, roughly; in float32."""
        c = problem.connectivity
        return 16 * (c.nnz + c.num_dendrites * len(problem.x))

    def make_leaves(self) -> dict[str, Tensor]:
        return {name: p.clone().requires_grad_() for name, p in self.problem.parameters.items()}

    def layer(self, x: Tensor) -> Tensor:
        """x [B, N] -> y [B, S]."""
        raise NotImplementedError

    def surroundings(self) -> AbstractContextManager[object]:
        """What every call runs in, entered before the clock starts."""
        return nullcontext()

    def run(self, mode: str) -> Tensor:
        if mode == "forward":
            with torch.no_grad():
                return self.layer(self.problem.x)
        x = self.x if mode == "training with dx" else self.problem.x
        x.grad = None
        for leaf in self.leaves.values():
            leaf.grad = None
        y = self.layer(x)
        y.backward(self.problem.grad)
        return y

    def results(self, mode: str) -> dict[str, Tensor | None]:
        """y and, by the names of x and the parameters, the gradients `mode` computes."""
        y = self.run(mode)
        if mode == "forward":
            return {"y": y}
        results = {"y": y, **self.gradients()}
        return {**results, "x": self.x.grad} if mode == "training with dx" else results

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: self.leaves[name].grad for name in PARAMETERS}


def gradient_of(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise ArithmeticError("no gradient")
    return leaf.grad
