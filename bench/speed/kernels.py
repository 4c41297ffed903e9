"""Forward and backward of a backend without autograd and dispatch, to compare with a roofline."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from dendrite_kernels.backends.protocol import Operands
from dendrite_kernels.benchmark.oracle import PARAMETERS
from dendrite_kernels.benchmark.problem import Problem

KERNELS = ("forward", "backward without dx", "backward")


class Kernels:
    """The kernels of backend `name`, called as in training; round_x: round x to bfloat16."""

    def __init__(self, name: str, problem: Problem, round_x: bool = False) -> None:
        p, backend = problem, importlib.import_module(f"dendrite_kernels.backends.{name}")
        operands = Operands(
            p.synapse_weight, p.dendrite_bias, p.cable_weight, p.soma_bias, p.connectivity,
            p.negative_slope,
        )  # fmt: skip
        self._forward = backend.forward, (p.x, operands, True, round_x)
        y, signs = self.run("forward")
        self._backward = backend.backward, (p.grad, p.x, y, signs, operands)

    def run(self, kernel: str) -> Any:
        if kernel == "forward":
            forward, inputs = self._forward
            return forward(*inputs)
        backward, saved = self._backward
        return backward(*saved, kernel == "backward")

    def results(self, kernel: str) -> dict[str, Tensor]:
        """Results with the names that the oracle uses."""
        if kernel == "forward":
            return {"y": self.run(kernel)[0]}
        dx, dw, dbd, dc, dbs = self.run(kernel)
        gradients = dict(zip(PARAMETERS, (dw, dbd, dc, dbs), strict=True))
        return {**gradients, "x": dx} if kernel == "backward" else gradients
